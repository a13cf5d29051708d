"""Comparison of two results files of the same requests."""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moempi.errors import DataError
from moempi.storage.records import RequestRecord
from moempi.storage.results import ResultFile


@dataclass(frozen=True, slots=True)
class Comparison:
    """`different` of `requests` differ in id, finish or tokens; `largest` is the largest log-probability difference."""

    requests: int
    different: int
    largest: float


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Compare all requests in order; raises DataError if the files hold different numbers of requests."""
    requests, different, largest = 0, 0, 0.0
    with ResultFile(first) as ours, ResultFile(second) as theirs:
        for one, other in zip_longest(ours.requests(), theirs.requests()):
            if one is None or other is None:
                raise DataError(f"{first} holds {ours.num_requests} requests, {second} {theirs.num_requests}")
            requests += 1
            if not _same_tokens(one, other):
                different += 1
                continue
            pairs = ((one.logprobs, other.logprobs), (one.score, other.score))
            largest = max(largest, *(_largest_difference(a, b) for a, b in pairs))
    return Comparison(requests, different, largest)


def _same_tokens(one: RequestRecord, other: RequestRecord) -> bool:
    return (
        (one.id, one.finish) == (other.id, other.finish)
        and np.array_equal(one.prompt, other.prompt)
        and np.array_equal(one.tokens, other.tokens)
        and len(one.score) == len(other.score)
    )


def _largest_difference(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The largest absolute difference; two NaN, as in the first score of a prompt, are equal, one NaN is infinite."""
    if np.array_equal(one, other, equal_nan=True):
        return 0.0
    difference = np.abs(one.astype(np.float64) - other)
    difference[np.isnan(one) & np.isnan(other)] = 0.0
    return float(np.nan_to_num(difference, nan=np.inf).max())
