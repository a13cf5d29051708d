"""The gates of two hops: which rank of each node a rank's rows enter by, and which rows cross to which node. Pure."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray

ABSENT = -1


@dataclass(frozen=True)
class Forwarders:
    """The ways of one rank to every node: `nodes` (R,) are the ranks' nodes, ascending from 0 without gaps."""

    nodes: tuple[int, ...]
    rank: int

    @cached_property
    def members(self) -> tuple[range, ...]:
        """The ranks of each node."""
        bounds = np.searchsorted(self.nodes, range(self.nodes[-1] + 2)).tolist()
        return tuple(range(first, last) for first, last in pairwise(bounds))

    @cached_property
    def ranks(self) -> IntArray:
        """The gate on each node (N,), ascending."""
        local = self.rank - self.members[self.nodes[self.rank]].start
        gates = np.array([members[local % len(members)] for members in self.members])
        gates[self.nodes[self.rank]] = self.rank
        return gates

    @property
    def node_ranks(self) -> range:
        """The ranks of this rank's node."""
        return self.members[self.nodes[self.rank]]


@dataclass(frozen=True, slots=True)
class NodeTransfers:
    """The (token, node) pairs of one plan, ordered by node: `tokens` (P,) and `nodes` (P,).

    `places` (T, N) are each token's pairs in the order of their first slots; where a token has fewer than N, the first
    is repeated with 0 in `present` (T, N), which has 1 elsewhere.
    """

    tokens: IntArray
    nodes: IntArray
    pairs: IntArray
    present: npt.NDArray[np.float32]


def node_transfers(nodes_of_choices: IntArray, num_nodes: int) -> NodeTransfers:
    """The crossings of tokens whose choices are on the nodes `where` (T, K)."""
    first_slots = np.full((len(nodes_of_choices), num_nodes), nodes_of_choices.shape[1])
    for slot in reversed(range(nodes_of_choices.shape[1])):
        first_slots[np.arange(len(nodes_of_choices)), nodes_of_choices[:, slot]] = slot
    nodes, tokens = np.nonzero((first_slots < nodes_of_choices.shape[1]).T)
    pairs = np.full(first_slots.shape, ABSENT)
    pairs[tokens, nodes] = np.arange(len(tokens))
    places = np.take_along_axis(pairs, np.argsort(first_slots, axis=1, kind="stable"), axis=1)
    present = places != ABSENT
    return NodeTransfers(tokens, nodes, np.where(present, places, places[:, :1]), present.astype(np.float32))
