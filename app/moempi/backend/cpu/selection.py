"""The scores of an indexer and the positions that they select, in NumPy."""

import numpy as np

from moempi.arrays import Float32Array, IntArray
from moempi.config.tensors import PAGE_ROWS

SCORED_KEYS = 16 * PAGE_ROWS
"""Keys that are scored at a time, so that the products of all heads stay small."""


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
