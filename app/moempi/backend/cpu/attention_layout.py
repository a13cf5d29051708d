"""Where the rows of a step are in the CPU's cache, and which queries and keys meet in a call of NumPy's attention."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moempi.arrays import Float32Array, Int32Array, IntArray, address_of
from moempi.backend.values import Segment, Segments
from moempi.config.tensors import PAGE_ROWS

BLOCK = 8
"""Rows of a call of BLAS, whose bits depend on the number of rows."""
Mask = tuple[int, Float32Array]


class AttentionTasks(NamedTuple):
    """Tasks of attention that threads share: the `first` (n + 1,) of each segment, their `number`, and their scores.

    `scores` are pairs of a row and a key, at most. `address` is of `first`.
    """

    first: IntArray
    number: int
    scores: int
    address: int


@dataclass(frozen=True, slots=True)
class CachedRows:
    """The layout of the rows of the segments `of`.

    `segments` (n, 4): row, length and start of each, and the index in `pages` of its first page; `spans` (n, 4): the
    same with the index of its state; `rows` (T,): the row of the cache of each new row.
    """

    of: Sequence[Segment]
    segments: IntArray
    spans: IntArray
    pages: Int32Array
    rows: IntArray
    _tasks: dict[tuple[int, int], AttentionTasks] = field(default_factory=dict)
    _addresses: list[int] = field(default_factory=list)

    @property
    def addresses(self) -> list[int]:
        """The addresses of `segments`, `pages` and `rows`, for all layers."""
        if not self._addresses:
            self._addresses.extend(map(address_of, (self.segments, self.pages, self.rows)))
        return self._addresses

    def attention_tasks(self, kv_heads: int, shared: int, queries: int) -> AttentionTasks:
        """The tasks of at most `queries` queries each, where `shared` heads share a key-value head, for all layers."""
        if (kv_heads, shared) not in self._tasks:
            lengths, starts = self.segments[:, 1], self.segments[:, 2]
            first = np.zeros(len(lengths) + 1, np.int64)
            (-(-lengths * shared // queries) * kv_heads).cumsum(out=first[1:])
            scores = int(lengths @ (starts + lengths))
            self._tasks[kv_heads, shared] = AttentionTasks(first, int(first[-1]), scores, address_of(first))
        return self._tasks[kv_heads, shared]

    @property
    def seen(self) -> IntArray:
        """The number of positions that each new row sees (T,)."""
        first, lengths, starts = self.segments[:, :3].T
        seen: IntArray = np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths) + 1
        return seen

    @property
    def first_pages(self) -> IntArray:
        """The index in `pages` of the first page of each new row's sequence (T,)."""
        first_pages: IntArray = np.repeat(self.segments[:, 3], self.segments[:, 1])
        return first_pages

    def rows_of(self, positions: IntArray, some: slice) -> IntArray:
        """The rows of the cache of `positions` (n, k) of some of the new rows."""
        return rows_of(self.pages.astype(np.int64), positions, first_page=self.first_pages[some, None])


def lay_out_rows(segments: Sequence[Segment]) -> CachedRows:
    """Lay out the rows of a step; the segments are in the order of their rows, without gaps."""
    step = Segments.of(segments)
    positions = np.arange(int(step.lengths.sum())) + (step.starts - step.rows).repeat(step.lengths)
    rows = rows_of(step.pages, positions, first_page=step.first_pages.repeat(step.lengths))
    numbered = np.empty((2, len(step), 4), np.int64)
    numbered[:, :, 0], numbered[:, :, 1], numbered[:, :, 2] = step.rows, step.lengths, step.starts
    numbered[0, :, 3], numbered[1, :, 3] = step.first_pages, step.states
    return CachedRows(segments, numbered[0], numbered[1], step.pages.astype(np.int32), rows.astype(np.int64))


def lay_out_copies(count: int, length: int) -> CachedRows:
    """The layout of `count` rows that each see `length` positions, in pages of its own, one after another."""
    pages = -(-length // PAGE_ROWS)
    numbers = np.arange(count)
    segments = np.stack([numbers, np.ones_like(numbers), np.full_like(numbers, length - 1), numbers * pages], axis=1)
    return CachedRows((), segments, segments[:0], np.arange(count * pages, dtype=np.int32), np.zeros(0, np.int64))


def query_blocks(start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Split query positions [start, end) into blocks: first position, end of the block, number of keys it sees.

    Blocks begin at multiples of BLOCK and may reach beyond the positions, and keys fill pages, so that a position is
    always in a call of the same shape.
    """
    for first in range(start - start % BLOCK, end, BLOCK):
        yield first, first + BLOCK, -(-(first + BLOCK) // PAGE_ROWS) * PAGE_ROWS


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
    return rows_of(pages, np.arange(start, end))


def rows_of(pages: IntArray, positions: IntArray, *, first_page: IntArray | int = 0) -> IntArray:
    """The rows of the cache of any positions of sequences whose pages begin at pages[first_page]."""
    return pages[first_page + positions // PAGE_ROWS] * PAGE_ROWS + positions % PAGE_ROWS
