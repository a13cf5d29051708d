"""Capacity: the number of a step's choices that each expert accepts, and which rows of a rank get them. Pure.

An expert accepts at most ceil(factor * T * K / E) of a step's T * K choices (GShard, Lepikhin et al. 2020). The
capacity is divided among the ranks in advance, so that each rank assigns its rows alone. Unlike in GShard, no choice is
dropped: a row whose expert is full gets another expert.
"""

from fractions import Fraction
from math import ceil

import numpy as np

from moempi.arrays import BoolArray, IntArray


def capacity(num_rows: int, *, top_k: int, num_experts: int, factor: float) -> int:
    """The largest number of choices that an expert accepts in a step of `num_rows` rows on all ranks."""
    return ceil(Fraction(str(factor)) * num_rows * top_k / num_experts)


def quotas(rows: IntArray, rank: int, *, top_k: int, num_experts: int, factor: float) -> IntArray:
    """The number of choices of each expert (E,) reserved for `rank`, where rank r has rows[r] of the step's rows.

    The quotas of all ranks add up to the capacity. The experts' choices are dealt round-robin, and each rank gets a run
    of them: `top_k` for each of its rows, and its share of the rest. The quotas of a rank therefore differ by at most
    one, and every row can have `top_k` different experts: the sum of min(quota, rows) over the experts is at least
    `top_k` per row, which suffices (Gale 1957, Ryser 1957).
    """
    num_rows = int(rows.sum())
    total = num_experts * capacity(num_rows, top_k=top_k, num_experts=num_experts, factor=factor)
    spare = total - top_k * num_rows
    before = [int(rows[:end].sum()) for end in (rank, rank + 1)]
    first, last = (top_k * end + (spare * end // num_rows if num_rows else 0) for end in before)
    # Of the dealt choices first, ..., last - 1, the ones equal to e modulo the number of experts are of expert e.
    experts = np.arange(num_experts)
    return (last - experts - 1) // num_experts - (first - experts - 1) // num_experts


def assign_within_quota(ranked: IntArray, quota: IntArray, top_k: int) -> IntArray:
    """Assign `top_k` experts to each row (T, K) within the quota (E,), given all experts in each row's order (T, E).

    All rows request their first expert, then the rows with fewer than `top_k` experts request their next one, and so
    on. An expert accepts requests of earlier rows first. The result is in each row's order. Raises ValueError if the
    quota does not suffice; the results of `quotas` do.
    """
    taken = np.zeros(ranked.shape, bool)  # in the row's order
    left = quota.copy()
    for preference in range(ranked.shape[1]):
        requesting = np.flatnonzero(taken.sum(axis=1) < top_k)
        if not len(requesting):
            break
        requested = ranked[requesting, preference]
        granted = _ordinals(requested, len(quota)) < left[requested]
        taken[requesting[granted], preference] = True
        left -= np.bincount(requested[granted], minlength=len(quota))
    for row in np.flatnonzero(taken.sum(axis=1) < top_k).tolist():
        while taken[row].sum() < top_k:
            _swap(ranked, taken, left, row)
    return ranked[taken].reshape(len(ranked), top_k)


def _ordinals(values: IntArray, num_values: int) -> IntArray:
    """The number of equal values before each value."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values, minlength=num_values)
    firsts = np.cumsum(counts) - counts
    ordinals = np.empty(len(values), np.int64)
    ordinals[order] = np.arange(len(values)) - firsts[values[order]]
    return ordinals


def _swap(ranked: IntArray, taken: BoolArray, left: IntArray, row: int) -> None:
    """Give `row` an expert of another row, which takes an expert with quota left in exchange.

    `row` itself has all experts with quota left. Another row that lacks one of them has `top_k` others, at least one of
    which `row`, with fewer than `top_k` experts, lacks.
    """
    own = set(ranked[row, taken[row]].tolist())
    for free in np.flatnonzero(left > 0).tolist():
        for other in np.flatnonzero(~taken[ranked == free]).tolist():
            given = [i for i in np.flatnonzero(taken[other]).tolist() if int(ranked[other, i]) not in own]
            if given:
                taken[other, given[-1]] = False
                taken[other, ranked[other] == free] = True
                taken[row, ranked[row] == ranked[other, given[-1]]] = True
                left[free] -= 1
                return
    raise ValueError("the quota has fewer places than the rows need")
