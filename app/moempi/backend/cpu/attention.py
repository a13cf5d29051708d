"""Attention over the cache in NumPy, in calls whose shapes depend on a row's position alone; softmax in float32."""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct

from moempi.arrays import Float32Array, Int32Array
from moempi.backend.cpu.attention_layout import Mask, cache_rows, causal_mask, query_blocks, rows_of
from moempi.backend.values import Cache, Segment
from moempi.config.tensors import PAGE_ROWS


class AttentionRule(Struct, frozen=True):
    """The factor of the scores, the number of positions that a row sees (0: all), and the sinks (heads,) if any."""

    scale: float
    window: int = 0
    sinks: Float32Array | None = None


def attend_segments(
    queries: Float32Array,
    cache: Cache,
    segments: Sequence[Segment],
    rule: AttentionRule,
    *,
    progress: Callable[[], None],
) -> Float32Array:
    """The outputs (T, H, value dim) of queries (T, H, dim), as by `Backend.attend`, not rounded."""
    (num_rows, heads, dim), window = queries.shape, rule.window
    attended = np.empty((num_rows, heads, cache.values.shape[-1]), np.float32)
    for segment in segments:
        end = segment.start + segment.length
        for first, last, num_keys in query_blocks(segment.start, end):
            first_key = max(0, first - window + 1) // PAGE_ROWS * PAGE_ROWS if window else 0
            seen = cache_rows(segment.pages, first_key, num_keys)
            mask = causal_mask(first, last, first_key=first_key, end_key=num_keys, window=window)
            low, high = max(first, segment.start), min(last, end)
            rows = slice(segment.row + low - segment.start, segment.row + high - segment.start)
            block = np.zeros((last - first, heads, dim), np.float32)
            np.multiply(queries[rows], np.float32(rule.scale), out=block[low - first : high - first])
            result = _attention(block, cache.keys[seen], cache.values[seen], mask, rule.sinks)
            attended[rows] = result[low - first : high - first]
            progress()
    return attended


def attend_positions(
    queries: Float32Array,
    cache: Cache,
    segments: Sequence[Segment],
    positions: Int32Array,
    *,
    scale: float,
    progress: Callable[[], None],
) -> Float32Array:
    """The outputs of queries over the positions (T, k) of each, as by `Backend.attend_selected`, not rounded."""
    attended = np.empty((*queries.shape[:2], cache.values.shape[-1]), np.float32)
    all_seen = positions.shape[1], np.zeros((1, 0), np.float32)
    for segment in segments:
        for row in range(segment.row, segment.row + segment.length):
            chosen = rows_of(segment.pages, positions[row])
            query = queries[row : row + 1] * np.float32(scale)
            attended[row] = _attention(query, cache.keys[chosen], cache.values[chosen], all_seen, None)[0]
        progress()
    return attended


def _attention(
    queries: Float32Array,
    keys: Float32Array,
    values: Float32Array,
    mask: Mask,
    sinks: Float32Array | None,
) -> Float32Array:
    """Softmax attention of scaled queries (n, H, dim) over keys (m, key-value heads, dim) -> (n, H, value dim)."""
    num_rows, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    shared = heads // kv_heads
    grouped = queries.reshape(num_rows, kv_heads, shared, dim).transpose(1, 0, 2, 3).reshape(kv_heads, -1, dim)
    scores = np.matmul(grouped, keys.transpose(1, 2, 0))
    from_key, penalty = mask
    scores.reshape(kv_heads, num_rows, shared, -1)[..., from_key:] += penalty[:, None, :]
    highest = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        sink = np.tile(sinks.reshape(kv_heads, shared), num_rows)[..., None]
        highest = np.maximum(highest, sink)
    scores -= highest
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sink - highest)
    mixed: Float32Array = np.matmul(scores, values.transpose(1, 0, 2))
    mixed /= total
    return mixed.reshape(kv_heads, num_rows, shared, -1).transpose(1, 0, 2, 3).reshape(num_rows, heads, -1)
