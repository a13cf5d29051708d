"""The topology of ranks, and the levels of links between them. Pure.

An island is a group of ranks inside a node with faster links: a processor socket, or GPUs that NVLink connects. Nodes
may be on different switches. Islands or switches are included only if they were detected for every rank and there are
several of them; otherwise their links count as the next level.
"""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from moempi.arrays import IntArray
from moempi.config.topology_file import LEVEL_NAMES, TopologyFile

LEVELS = LEVEL_NAMES
SELF, ISLAND, NODE, SWITCH, NETWORK = range(len(LEVELS))


class Topology(Struct, frozen=True):
    """The node of each rank (R,), ascending from 0 without gaps; its island and its switch, or () if unknown.

    Islands and switches are numbered over all nodes: an island is inside one node, a node on one switch.
    """

    nodes: tuple[int, ...]
    islands: tuple[int, ...] = ()
    switches: tuple[int, ...] = ()

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return self.nodes[-1] + 1

    def levels(self, rank: int) -> IntArray:
        """The level of the link from `rank` to each rank, an index into LEVELS (R,)."""
        levels = np.full(len(self.nodes), NETWORK)
        for level, numbers in ((SWITCH, self.switches), (NODE, self.nodes), (ISLAND, self.islands)):
            if numbers:
                levels[np.asarray(numbers) == numbers[rank]] = level
        levels[rank] = SELF
        return levels

    def level(self, rank: int, other: int) -> int:
        """The level of the link between two ranks."""
        if rank == other:
            return SELF
        levels = ((ISLAND, self.islands), (NODE, self.nodes), (SWITCH, self.switches))
        return next((level for level, numbers in levels if numbers and numbers[rank] == numbers[other]), NETWORK)

    def subset(self, ranks: range) -> "Topology":
        """The topology of these ranks alone."""
        nodes, islands, switches = (
            numbers[ranks.start : ranks.stop] for numbers in (self.nodes, self.islands, self.switches)
        )
        return Topology(numbered(nodes), islands, switches)


def numbered(nodes: Sequence[int]) -> tuple[int, ...]:
    """Ascending nodes, renumbered from 0 without gaps."""
    return tuple(np.unique(nodes, return_inverse=True)[1].tolist())


def arrange(nodes: Sequence[str], islands: Sequence[str], switches: Sequence[str]) -> tuple[list[int], Topology]:
    """The ranks ordered by switch, then by node, and the topology of the ranks in that order.

    Arguments are the names of each rank's node, of the island in it, and of the switch, "" if unknown. Switches and
    nodes are in the order of their first appearance.
    """
    switch_numbers = _numbers(switches) if all(switches) else [0] * len(nodes)
    order = np.lexsort((range(len(nodes)), _numbers(nodes), switch_numbers)).tolist()
    named = [f"{node} {island}" for node, island in zip(nodes, islands, strict=True)]
    return order, Topology(
        nodes=_numbers([nodes[rank] for rank in order]),
        islands=_numbers([named[rank] for rank in order]) if all(islands) and len({*named}) > len({*nodes}) else (),
        switches=_numbers([switches[rank] for rank in order]) if all(switches) and len({*switches}) > 1 else (),
    )


def virtual(num_ranks: int, ranks_per_node: int) -> Topology:
    """Nodes of `ranks_per_node` ranks each; the last node has the remainder."""
    return Topology(tuple(rank // ranks_per_node for rank in range(num_ranks)))


def from_file(file: TopologyFile) -> Topology:
    """The topology in a file."""
    return Topology(file.nodes, file.islands, file.switches)


def _numbers(names: Sequence[str]) -> tuple[int, ...]:
    """Numbers of names, in the order of first appearance."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)
