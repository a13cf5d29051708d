"""Where ranks stand, and the levels of links between them. Pure.

A node may be divided into islands, ranks that are nearer to each other than to the rest of their node: those of one
processor socket, or with GPUs those that NVLink joins. Nodes may hang on different switches. Either division is known
only where it was found for every rank and divides anything; else it is left out, and its links count as the next level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moempi.arrays import IntArray
from moempi.config.topology_file import LEVEL_NAMES, TopologyFile

LEVELS = LEVEL_NAMES
SELF, ISLAND, NODE, SWITCH, NETWORK = range(len(LEVELS))


@dataclass(frozen=True, slots=True)
class Topology:
    """The node of each rank (R,), ascending from 0 without gaps; its island and its switch, or () where unknown.

    Islands and switches are numbered over all nodes: an island lies in one node, a node at one switch.
    """

    nodes: tuple[int, ...]
    islands: tuple[int, ...] = ()
    switches: tuple[int, ...] = ()

    @property
    def num_nodes(self) -> int:
        """Nodes that have ranks."""
        return self.nodes[-1] + 1

    def levels(self, rank: int) -> IntArray:
        """The level of the link from `rank` to each rank, an index into LEVELS (R,)."""
        levels = np.full(len(self.nodes), NETWORK)
        for level, places in ((SWITCH, self.switches), (NODE, self.nodes), (ISLAND, self.islands)):
            if places:
                levels[np.asarray(places) == places[rank]] = level
        levels[rank] = SELF
        return levels

    def subset(self, ranks: range) -> "Topology":
        """That of these ranks alone."""
        nodes, islands, switches = (
            places[ranks.start : ranks.stop] for places in (self.nodes, self.islands, self.switches)
        )
        return Topology(numbered(nodes), islands, switches)


def numbered(nodes: Sequence[int]) -> tuple[int, ...]:
    """Ascending nodes as numbers from 0 on without gaps."""
    return tuple(np.unique(nodes, return_inverse=True)[1].tolist())


def arrange(nodes: Sequence[str], islands: Sequence[str], switches: Sequence[str]) -> tuple[list[int], Topology]:
    """An order of ranks, switch by switch and node by node, and the topology of the ranks in that order.

    What is found first comes first. Given are each rank's node, the island in it, and the switch, "" for unknown.
    """
    where = np.array([_in_order(switches) if all(switches) else [0] * len(nodes), _in_order(nodes), range(len(nodes))])
    order = np.lexsort(where[::-1]).tolist()
    named = [f"{node} {island}" for node, island in zip(nodes, islands, strict=True)]
    return order, Topology(
        nodes=_in_order([nodes[rank] for rank in order]),
        islands=_in_order([named[rank] for rank in order]) if all(islands) and len({*named}) > len({*nodes}) else (),
        switches=_in_order([switches[rank] for rank in order]) if all(switches) and len({*switches}) > 1 else (),
    )


def virtual(num_ranks: int, ranks_per_node: int) -> Topology:
    """Nodes of so many ranks each, and one of the rest."""
    return Topology(tuple(rank // ranks_per_node for rank in range(num_ranks)))


def from_file(file: TopologyFile) -> Topology:
    """The topology that a file states."""
    return Topology(file.nodes, file.islands, file.switches)


def _in_order(names: Sequence[str]) -> tuple[int, ...]:
    """Names as numbers in the order of their first appearance."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return tuple(numbers[name] for name in names)
