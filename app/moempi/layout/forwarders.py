"""Forwarders of two hops: the rank of each node that receives a rank's rows, and the rows to each node. Pure."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from moempi.arrays import IntArray

ABSENT = -1


@dataclass(frozen=True)
class Forwarders:
    """The forwarders of one rank; `nodes` (R,) are the ranks' nodes, ascending from 0 without gaps."""

    nodes: tuple[int, ...]
    rank: int

    @cached_property
    def members(self) -> tuple[range, ...]:
        """The ranks of each node."""
        bounds = np.searchsorted(self.nodes, range(self.nodes[-1] + 2)).tolist()
        return tuple(range(first, last) for first, last in pairwise(bounds))

    @cached_property
    def ranks(self) -> IntArray:
        """The forwarder on each node (N,), ascending: the rank with this local index, or itself on its own node."""
        local = self.rank - self.members[self.nodes[self.rank]].start
        forwarders = np.array([members[local % len(members)] for members in self.members])
        forwarders[self.nodes[self.rank]] = self.rank
        return forwarders

    @property
    def node_ranks(self) -> range:
        """The ranks of this rank's node."""
        return self.members[self.nodes[self.rank]]


class NodeTransfers(Struct, frozen=True):
    """The (token, node) pairs of one plan, ordered by node: `tokens` (P,) and `nodes` (P,).

    `pairs` (T, N) are the indices of each token's pairs, in the order of their first slots. A token with fewer than N
    pairs repeats its first one; `present` (T, N) is 0 for repetitions and 1 for pairs.
    """

    tokens: IntArray
    nodes: IntArray
    pairs: IntArray
    present: npt.NDArray[np.float32]


def node_transfers(nodes_of_choices: IntArray, num_nodes: int) -> NodeTransfers:
    """The node transfers of tokens whose choices are on `nodes_of_choices` (T, K)."""
    first_slots = np.full((len(nodes_of_choices), num_nodes), nodes_of_choices.shape[1])
    for slot in reversed(range(nodes_of_choices.shape[1])):
        first_slots[np.arange(len(nodes_of_choices)), nodes_of_choices[:, slot]] = slot
    nodes, tokens = np.nonzero((first_slots < nodes_of_choices.shape[1]).T)
    by_node = np.full(first_slots.shape, ABSENT)
    by_node[tokens, nodes] = np.arange(len(tokens))
    pairs = np.take_along_axis(by_node, np.argsort(first_slots, axis=1, kind="stable"), axis=1)
    present = pairs != ABSENT
    return NodeTransfers(tokens, nodes, np.where(present, pairs, pairs[:, :1]), present.astype(np.float32))
