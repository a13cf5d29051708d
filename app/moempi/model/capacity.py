"""Capacity: how many of a step's choices each expert takes, and who of a rank's rows gets them. Pure.

An expert takes at most ceil(factor * T * K / E) of a step's T * K choices (GShard, Lepikhin et al. 2020). Its places
are dealt to the ranks ahead, so that each can decide alone about its rows; no row loses a choice, as it would there.
"""

from fractions import Fraction
from math import ceil

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray


def capacity(num_rows: int, *, top_k: int, num_experts: int, factor: float) -> int:
    """The most choices that an expert takes of a step of `num_rows` rows on all ranks."""
    return ceil(Fraction(str(factor)) * num_rows * top_k / num_experts)


def quotas(rows: IntArray, rank: int, *, top_k: int, num_experts: int, factor: float) -> IntArray:
    """The places of each expert (E,) that are for the rows of `rank`, where rank r has rows[r] of the step's.

    Over all ranks they add up to the capacity. They are dealt expert by expert, round and round, and each rank gets a
    run of them: `top_k` for each of its rows, and its share of what is beyond. So its experts' places differ by one at
    most, and every row can have `top_k` different ones: min(places, rows) of all experts add up to `top_k` a row at
    least, which suffices (Gale 1957, Ryser 1957).
    """
    num_rows = int(rows.sum())
    places = num_experts * capacity(num_rows, top_k=top_k, num_experts=num_experts, factor=factor)
    spare = places - top_k * num_rows
    before = [int(rows[:end].sum()) for end in (rank, rank + 1)]
    first, last = (top_k * end + (spare * end // num_rows if num_rows else 0) for end in before)
    # Of the places first, first + 1, ..., last - 1, expert e has those that are e modulo the number of experts.
    experts = np.arange(num_experts)
    return (last - experts - 1) // num_experts - (first - experts - 1) // num_experts


def assign_within_quota(ranked: IntArray, quota: IntArray, top_k: int) -> IntArray:
    """Choose `top_k` experts (T, K) for each row within the quota (E,), given all experts in its order (T, E).

    Rows ask for their first experts, then those that still lack some for their next ones, and so on; an expert takes
    who asks first, earlier rows before later ones. Returns them in the row's own order. Raises ValueError when the
    quota does not suffice; those of `quotas` do.
    """
    taken = np.zeros(ranked.shape, bool)  # in the row's order
    left = quota.copy()
    for turn in range(ranked.shape[1]):
        asking = np.flatnonzero(taken.sum(axis=1) < top_k)
        if not len(asking):
            break
        wanted = ranked[asking, turn]
        granted = _ordinals(wanted, len(quota)) < left[wanted]
        taken[asking[granted], turn] = True
        left -= np.bincount(wanted[granted], minlength=len(quota))
    for row in np.flatnonzero(taken.sum(axis=1) < top_k).tolist():
        while taken[row].sum() < top_k:
            _swap(ranked, taken, left, row)
    return ranked[taken].reshape(len(ranked), top_k)


def _ordinals(values: IntArray, num_values: int) -> IntArray:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values, minlength=num_values)
    firsts = np.cumsum(counts) - counts
    ordinals = np.empty(len(values), np.int64)
    ordinals[order] = np.arange(len(values)) - firsts[values[order]]
    return ordinals


def _swap(ranked: IntArray, taken: npt.NDArray[np.bool_], left: IntArray, row: int) -> None:
    """Give `row` one more expert: another row hands it one and takes an expert in exchange that has places left.

    `row` itself has all experts with places left. Another row without one of them has `top_k` others, of which `row`,
    which has fewer, lacks one at least.
    """
    own = set(ranked[row, taken[row]].tolist())
    for free in np.flatnonzero(left > 0).tolist():
        for other in np.flatnonzero(~taken[ranked == free]).tolist():
            handed = [turn for turn in np.flatnonzero(taken[other]).tolist() if int(ranked[other, turn]) not in own]
            if handed:
                taken[other, handed[-1]] = False
                taken[other, ranked[other] == free] = True
                taken[row, ranked[row] == ranked[other, handed[-1]]] = True
                left[free] -= 1
                return
    raise ValueError("the quota has fewer places than the rows need")
