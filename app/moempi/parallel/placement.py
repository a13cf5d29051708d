"""Placement: which rank of a group hosts which experts. Pure."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Placement:
    """`hosted[r]` lists the experts on rank r of the group; every expert stands exactly once."""

    hosted: tuple[tuple[int, ...], ...]

    @cached_property
    def keys(self) -> IntArray:
        """Sort key of each expert (E,): experts in the order of their rank, then of their place on it."""
        order = np.array([expert for experts in self.hosted for expert in experts], np.int64)
        keys = np.empty_like(order)
        keys[order] = np.arange(len(order))
        return keys

    @cached_property
    def bounds(self) -> IntArray:
        """Rank r hosts the experts whose keys lie in [bounds[r], bounds[r + 1]) (R + 1,)."""
        return np.concatenate([[0], np.cumsum([len(experts) for experts in self.hosted])])

    def part(self, ranks: range) -> "Placement":
        """The placement among these ranks alone, where the number of an expert is its key less the first key."""
        bounds = self.bounds[ranks.start : ranks.stop + 1] - self.bounds[ranks.start]
        return Placement(tuple(tuple(range(first, last)) for first, last in pairwise(bounds.tolist())))


def linear(num_experts: int, num_ranks: int) -> Placement:
    """Experts in ascending order, in shares that differ by one at most; ranks beyond the experts host none."""
    bounds = [rank * num_experts // num_ranks for rank in range(num_ranks + 1)]
    if num_ranks > num_experts:
        bounds = [min(rank, num_experts) for rank in range(num_ranks + 1)]
    return Placement(tuple(tuple(range(first, last)) for first, last in pairwise(bounds)))
