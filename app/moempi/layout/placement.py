"""Placement: the experts of a layer on each rank of a stage, and the replica that each row is sent to. Pure."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np

from moempi.arrays import IntArray
from moempi.layout.topology import Topology

REPLICA_PERIOD = 60
"""Rows go to equally near replicas in rotation, which repeats after this many rows; 1 to 6 replicas divide it."""


@dataclass(frozen=True)
class Placement:
    """`hosted[r]` lists the experts on rank r of the stage; an expert on several ranks has replicas.

    Each expert on a rank is a physical expert. The P physical ids count up from rank to rank, and on a rank in the
    order of `hosted` (terms of DeepSeek's EPLB: logical and physical experts).
    """

    hosted: tuple[tuple[int, ...], ...]

    @cached_property
    def experts(self) -> IntArray:
        """The (logical) expert of each physical id (P,)."""
        return np.array([expert for experts in self.hosted for expert in experts], np.int64)

    @cached_property
    def counts(self) -> IntArray:
        """The number of experts on each rank (R,)."""
        return np.array([len(experts) for experts in self.hosted])

    @cached_property
    def most(self) -> int:
        """The number of experts on the rank that hosts most."""
        return int(self.counts.max(initial=0))

    @cached_property
    def bounds(self) -> IntArray:
        """Rank r hosts the physical ids in [bounds[r], bounds[r + 1]) (R + 1,)."""
        return np.concatenate([[0], np.cumsum(self.counts)])

    @cached_property
    def ranks(self) -> IntArray:
        """The rank of each physical id (P,)."""
        return np.repeat(np.arange(len(self.hosted)), np.diff(self.bounds))

    @cached_property
    def num_experts(self) -> int:
        """The number E of experts of the layer, without replicas."""
        return int(self.experts.max(initial=-1)) + 1

    @property
    def replica_period(self) -> int:
        """The number of rows after which the rotation of replicas repeats; 1 without replicas."""
        return 1 if len(self.experts) == self.num_experts else REPLICA_PERIOD

    def physical_ids(self, source: int, topology: Topology) -> IntArray:
        """The physical ids that rows of rank `source` are sent to (E * period,), with period = `replica_period`.

        Row t of a step and expert e use entry e * period + t % period: the nearest replica, on the same rank, island,
        node or switch, else any. Rows rotate among equally near replicas, and each source begins with another one.
        """
        levels = topology.levels(source)[self.ranks]
        order = np.lexsort((levels, self.experts))
        experts, levels = self.experts[order], levels[order]
        firsts = np.searchsorted(experts, np.arange(self.num_experts))
        nearest = levels == levels[firsts][experts]
        replicas = np.bincount(experts[nearest], minlength=self.num_experts)
        rotation = (source + np.arange(self.replica_period)) % replicas[:, None]
        return order[firsts[:, None] + rotation].reshape(-1)

    def subset(self, ranks: range) -> "Placement":
        """The placement on these ranks alone, whose experts are the physical ids, less that of the first."""
        bounds = self.bounds[ranks.start : ranks.stop + 1] - self.bounds[ranks.start]
        return Placement(tuple(tuple(range(first, last)) for first, last in pairwise(bounds.tolist())))


@lru_cache(maxsize=1 << 8)
def linear(num_experts: int, num_ranks: int) -> Placement:
    """Experts in ascending order, in shares that differ by at most one; surplus ranks host none."""
    bounds = [rank * num_experts // num_ranks for rank in range(num_ranks + 1)]
    if num_ranks > num_experts:
        bounds = [min(rank, num_experts) for rank in range(num_ranks + 1)]
    return Placement(tuple(tuple(range(first, last)) for first, last in pairwise(bounds)))
