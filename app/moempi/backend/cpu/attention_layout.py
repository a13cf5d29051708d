"""Which queries and keys meet in one call of the CPU's attention: blocks of queries, cache rows, and the mask."""

from collections.abc import Iterator

import numpy as np

from moempi.arrays import Float32Array, IntArray
from moempi.backend.cpu.blocked_product import BLOCK
from moempi.config.tensors import PAGE_ROWS

QUERY_ROWS = 128
Mask = tuple[int, Float32Array]


def query_blocks(start: int, end: int, *, reproducible: bool) -> Iterator[tuple[int, int, int]]:
    """Split query positions [start, end) into blocks: first position, end of the block, number of keys it sees.

    When `reproducible`, blocks begin at multiples of BLOCK and may reach beyond the positions, and keys fill pages, so
    that a position is always in a call of the same shape.
    """
    if reproducible:
        for first in range(start - start % BLOCK, end, BLOCK):
            yield first, first + BLOCK, -(-(first + BLOCK) // PAGE_ROWS) * PAGE_ROWS
    else:
        for first in range(start, end, QUERY_ROWS):
            last = min(first + QUERY_ROWS, end)
            yield first, last, last


def causal_mask(first: int, last: int, *, first_key: int, end_key: int, window: int) -> Mask:
    """Additive mask of positions [first, last) over keys [first_key, end_key): -inf where a position sees no key.

    Returns the column of the first masked key, and the mask (positions, keys) from this column on.
    """
    from_key = first_key if window else min(first + 1, end_key)
    positions, keys = np.arange(first, last)[:, None], np.arange(from_key, end_key)[None, :]
    outside = keys > positions
    if window:
        outside |= keys <= positions - window
    return from_key - first_key, np.where(outside, np.float32(-np.inf), np.float32(0))


def cache_rows(pages: IntArray, start: int, end: int) -> slice | IntArray:
    """Index of positions [start, end) in the cache: a slice if their pages are adjacent, else an array."""
    first, last = start // PAGE_ROWS, -(-end // PAGE_ROWS)
    held = pages[first:last]
    if len(held) == 1 or bool((np.diff(held) == 1).all()):
        base = (int(held[0]) - first) * PAGE_ROWS
        return slice(base + start, base + end)
    positions = np.arange(start, end)
    return pages[positions // PAGE_ROWS] * PAGE_ROWS + positions % PAGE_ROWS
