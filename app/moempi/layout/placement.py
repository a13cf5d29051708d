"""Placement: which rank of a stage hosts which experts of a layer, and which copy of an expert a row goes to. Pure."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from moempi.arrays import IntArray
from moempi.layout.topology import Topology

REPLICA_PERIOD = 60
"""Rows go to equally near copies of an expert in turns that repeat after so many rows: 1 to 6 copies divide it."""


@dataclass(frozen=True)
class Placement:
    """`hosted[r]` lists the experts on rank r of the stage; an expert stands on one rank or, as copies, on several.

    Each expert on a rank has a key: they count up from rank to rank, and on a rank in the order of `hosted` (P keys).
    """

    hosted: tuple[tuple[int, ...], ...]

    @cached_property
    def experts(self) -> IntArray:
        """The expert of each key (P,)."""
        return np.array([expert for experts in self.hosted for expert in experts], np.int64)

    @cached_property
    def bounds(self) -> IntArray:
        """Rank r hosts the experts whose keys lie in [bounds[r], bounds[r + 1]) (R + 1,)."""
        return np.concatenate([[0], np.cumsum([len(experts) for experts in self.hosted])])

    @cached_property
    def ranks(self) -> IntArray:
        """The rank of each key (P,)."""
        return np.repeat(np.arange(len(self.hosted)), np.diff(self.bounds))

    @cached_property
    def num_experts(self) -> int:
        """Experts of the layer, each counted once (E)."""
        return int(self.experts.max(initial=-1)) + 1

    @property
    def replica_period(self) -> int:
        """After how many rows the turns of copies repeat; 1 where no expert has a copy."""
        return 1 if len(self.experts) == self.num_experts else REPLICA_PERIOD

    def physical_ids(self, source: int, topology: Topology) -> IntArray:
        """The key that a row of rank `source` goes to (E * turns,), given where the ranks stand.

        Row t of a step finds that of expert e at e * turns + t % turns. It is the nearest copy: on its own rank, its
        island, its node, its switch, on any. Equally near ones take turns, each source beginning with another.
        """
        levels = topology.levels(source)[self.ranks]
        order = np.lexsort((levels, self.experts))
        experts, levels = self.experts[order], levels[order]
        firsts = np.searchsorted(experts, np.arange(self.num_experts))
        nearest = levels == levels[firsts][experts]
        copies = np.bincount(experts[nearest], minlength=self.num_experts)
        turn = (source + np.arange(self.replica_period)) % copies[:, None]
        return order[firsts[:, None] + turn].reshape(-1)

    def subset(self, ranks: range) -> "Placement":
        """The placement among these ranks alone, where the number of an expert is its key less the first key."""
        bounds = self.bounds[ranks.start : ranks.stop + 1] - self.bounds[ranks.start]
        return Placement(tuple(tuple(range(first, last)) for first, last in pairwise(bounds.tolist())))


def linear(num_experts: int, num_ranks: int) -> Placement:
    """Experts in ascending order, in shares that differ by one at most; ranks beyond the experts host none."""
    bounds = [rank * num_experts // num_ranks for rank in range(num_ranks + 1)]
    if num_ranks > num_experts:
        bounds = [min(rank, num_experts) for rank in range(num_ranks + 1)]
    return Placement(tuple(tuple(range(first, last)) for first, last in pairwise(bounds)))
