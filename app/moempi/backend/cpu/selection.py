"""The scores of an indexer and the positions that they select, in NumPy."""

from collections.abc import Callable, Sequence

import numpy as np

from moempi.arrays import Float32Array, Int32Array, IntArray
from moempi.backend.cpu.attention_layout import cache_rows, query_blocks
from moempi.backend.values import Cache, Segment
from moempi.config.tensors import PAGE_ROWS

SCORED_KEYS = 16 * PAGE_ROWS
"""Keys that are scored at a time, so that the products of all heads stay small."""


def select_of_segments(
    queries: Float32Array,
    weights: Float32Array,
    index: Cache,
    segments: Sequence[Segment],
    *,
    top_k: int,
    progress: Callable[[], None],
) -> Int32Array:
    """The positions (T, top_k) of queries (T, H, dim) with weights (T, H), as by `Backend.select_positions`."""
    positions = np.empty((len(queries), top_k), np.int32)
    for segment in segments:
        end = segment.start + segment.length
        for first, last, num_keys in query_blocks(segment.start, end):
            low, high = max(first, segment.start), min(last, end)
            rows = range(segment.row + low - segment.start, segment.row + high - segment.start)
            own, block = slice(low - first, high - first), (last - first, *queries.shape[1:])
            padded, padded_weights = np.zeros(block, np.float32), np.zeros(block[:2], np.float32)
            padded[own], padded_weights[own] = queries[rows.start : rows.stop], weights[rows.start : rows.stop]
            keys = index.keys[cache_rows(segment.pages, 0, num_keys), 0]
            scores = index_scores(padded, padded_weights, keys)[own]
            for row, seen, of_row in zip(rows, range(low + 1, high + 1), scores, strict=True):
                positions[row] = best_positions(of_row[:seen], top_k)
            progress()
    return positions


def index_scores(queries: Float32Array, weights: Float32Array, keys: Float32Array) -> Float32Array:
    """The scores (n, m) of queries (n, H, dim) with weights (n, H) for keys (m, dim)."""
    num_rows, heads, dim = queries.shape
    scores = np.empty((num_rows, len(keys)), np.float32)
    for first in range(0, len(keys), SCORED_KEYS):
        some = keys[first : first + SCORED_KEYS]
        products = np.matmul(queries.reshape(-1, dim), some.T).reshape(num_rows, heads, -1)
        np.maximum(products, 0, out=products)
        scores[:, first : first + SCORED_KEYS] = np.matmul(weights[:, None, :], products)[:, 0]
    return scores


def best_positions(scores: Float32Array, count: int) -> IntArray:
    """The `count` positions of the largest scores (n,), ascending; the lowest on a tie, and NaN counts as infinity."""
    scores = np.where(np.isnan(scores), np.float32(np.inf), scores)
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    chosen = scores > least
    ties = np.flatnonzero(scores == least)
    chosen[ties[: count - int(chosen.sum())]] = True
    positions: IntArray = np.flatnonzero(chosen)
    return positions
