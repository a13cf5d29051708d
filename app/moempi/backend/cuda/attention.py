"""Attention over a paged cache: tiles of many queries on tensor cores, single rows in blocks of keys."""

from functools import cache as cached
from typing import NamedTuple

import numpy as np

from moempi.backend.cuda.attention_layout import AttentionLayout, SingleRows, TileKernel, head_dims, is_latent
from moempi.backend.cuda.device import find_kernel
from moempi.backend.cuda.launches import Launches, extents, norm_threads, rows_from
from moempi.backend.values import Array, Cache, RmsNorm

SPLIT_KEYS = 256
"""Keys per block of kernels/attention.cu."""
MOST_BLOCKS = 65_535
"""Blocks of a grid along its second or third axis."""
PARTIAL_BYTES = 64 << 20
"""Memory for the partial results of kernels/attention.cu; more rows are attended in several launches."""
SPLIT_HEADS = 4
"""Query heads that share a key-value head and a block of kernels/attention.cu."""
ROTATED_NUMBERS = 2048
"""Numbers of a row per block of `rotate` and of the rotations into a cache."""
MOST_HEADS = 64
"""Heads per block of `rotate_into_cache`; equals MOST_TOGETHER of kernels/rope.cu."""


class Rule(NamedTuple):
    """The factor of the scores, the number of positions that a row sees (0: all), and the sinks (heads,) if any."""

    scale: float
    window: int
    sinks: Array | None


class Queries(NamedTuple):
    """Queries (T, H, dim), or their first numbers, with what comes behind them and is rotated where they are read.

    `rotary` is (T, H, rope dim), `angles` are the cosines and sines (T, n) of the rows.
    """

    numbers: Array
    rotary: Array | None = None
    angles: tuple[Array, Array] | None = None
    interleaved: bool = False

    def rows_from(self, first: int, count: int) -> tuple[Array | None, ...]:
        """Numbers, rotary, cosines and sines of rows [first, first + count)."""
        parts = (self.numbers, self.rotary, *(self.angles or (None, None)))
        if count == len(self.numbers):
            return parts
        return tuple(part if part is None else rows_from(part, first, count) for part in parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Pairs, whether they are interleaved, and the row stride and head stride of `rotary`."""
        if self.rotary is None or self.angles is None:
            return 0, 0, 0, 0
        _, _, *strides = extents(self.rotary)
        return self.angles[0].shape[1], int(self.interleaved), *strides


class PagedAttention:
    """The kernels that write and read the cache."""

    def __init__(self, launches: Launches) -> None:
        self._launches = launches
        self._device = launches.device

    def extend_cache(self, cache: Cache, keys: Array, values: Array | None, layout: AttentionLayout) -> None:
        """Write the new rows' keys and values (T, heads, dim); without values, a latent cache's keys alone."""
        for new, held in ((keys, cache.keys), (values, cache.values)):
            if new is not None:
                given = (new, held, layout.spans, layout.pages)
                self._launches.by_segment("kv_cache", "extend_cache", new, *given, *extents(new))

    def rotate_into_cache(
        self,
        heads: tuple[Array, Array, Array],
        angles: tuple[Array, Array],
        cache: Cache,
        layout: AttentionLayout,
        *,
        interleaved: bool = False,
        norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> Array:
        """The rotated queries; keys, rotated too, and values are written to the cache."""
        out = self._launches.rows(heads[0].shape)
        (num_heads, dim, *strides), (kv_heads, _, *key_strides), (_, _, *value_strides) = map(extents, heads)
        weights = [norm.weight for norm in norms] if norms else [None, None]
        eps, rounded = (norms[0].eps, norms[0].rounded) if norms else (0.0, True)
        together = min(MOST_HEADS, max(1, ROTATED_NUMBERS // dim))
        given = (*heads, *weights, *angles, layout.spans, layout.pages, out, cache.keys, cache.values)
        sizes = (num_heads, kv_heads, dim, angles[0].shape[1], *strides, *key_strides, *value_strides, together)
        grid = (len(out), -(-(num_heads + 2 * kv_heads) // together), 1)
        constants = self._launches.weight_type(weights[0])
        self._launches.launch(
            "rope", "rotate_into_cache", grid, 128, *given, *sizes, interleaved, eps, rounded, **constants
        )
        return out

    def extend_latent_cache(
        self,
        keys: tuple[Array, Array],
        angles: tuple[Array, Array],
        cache: Cache,
        layout: AttentionLayout,
        *,
        norm: RmsNorm,
        interleaved: bool = False,
        queries: tuple[Array, RmsNorm] | None = None,
    ) -> Array | None:
        """Cache the keys, and return the normalized latent vectors of queries; see `Backend.extend_latent_cache`."""
        (_, kept, kept_stride, _), (_, dim, key_stride, _) = map(extents, keys)
        latent, query_norm = queries or (None, None)
        out = None if latent is None else self._launches.rows(latent.shape)
        _, query_dim, query_stride, _ = (0, 0, 0, 0) if latent is None else extents(latent)
        weights = (query_norm and query_norm.weight, norm.weight)
        given = (latent, *keys, *weights, *angles, layout.spans, layout.pages, out, cache.keys)
        sizes = (query_dim, kept, dim, angles[0].shape[1], query_stride, kept_stride, key_stride, interleaved)
        grid, threads = (len(keys[0]), 1, 1), 128
        if latent is not None:
            grid, threads = (len(keys[0]), 2, 1), norm_threads(query_dim)
        eps = (query_norm.eps if query_norm else 0.0, norm.eps)
        constants = self._launches.weight_type(norm.weight)
        self._launches.launch("rope", "extend_latent_cache", grid, threads, *given, *sizes, *eps, **constants)
        return out

    def attend(self, queries: Array, cache: Cache, layout: AttentionLayout, rule: Rule) -> Array:
        """The outputs (T, H, value dim) of queries (T, H, dim)."""
        out = self._launches.rows((*queries.shape[:2], cache.values.shape[-1]))
        if layout.tile_kernel is not None and len(layout.tiles):
            self._attend_tiles(queries, cache, layout, layout.tile_kernel, rule, out)
        for run in layout.single_rows:
            self.attend_rows(Queries(queries), cache, layout, run, rule, out)
        return out

    def attend_latent(self, queries: Queries, cache: Cache, layout: AttentionLayout, rule: Rule) -> Array:
        """The outputs (T, H, value dim) of queries whose numbers are as many as a value of the latent cache has."""
        out = self._launches.rows(queries.numbers.shape)
        for run in layout.single_rows:
            self.attend_rows(queries, cache, layout, run, rule, out)
        return out

    def _attend_tiles(
        self, queries: Array, cache: Cache, layout: AttentionLayout, kernel: TileKernel, rule: Rule, out: Array
    ) -> None:
        given = (queries, cache.keys, cache.values, rule.sinks, layout.tiles, layout.pages, out)
        self._device.launch(
            find_kernel(f"{kernel.file}.cu", "attend_tiles", tuple(head_dims(cache).items())),
            (len(layout.tiles), out.shape[1], 1),
            kernel.threads,
            (*given, cache.keys.shape[1], rule.scale, rule.window),
            shared_bytes=kernel.shared_bytes(cache),
        )

    def attend_rows(
        self, queries: Queries, cache: Cache, layout: AttentionLayout, run: SingleRows, rule: Rule, out: Array
    ) -> None:
        """Attend single rows in blocks of keys: launches of as many rows as PARTIAL_BYTES holds, which share it."""
        _, heads, value_dim = out.shape
        _, kv_heads, key_dim = cache.keys.shape
        together, head_rounds = _divide(heads, kv_heads)
        value_stride = key_dim if is_latent(cache) else value_dim
        sizes = (heads, kv_heads, value_stride, rule.scale, rule.window, *queries.sizes)
        rows, splits = run.rows, num_splits(run)
        partial_bytes = heads * splits * value_dim * 4 if splits > 1 else 0
        step = max(1, min(MOST_BLOCKS, PARTIAL_BYTES // max(1, partial_bytes)))
        most_rows = min(step, len(rows))
        sums = stats = arrived = None
        if splits > 1:
            sums = self._launches.empty((most_rows, heads, splits, value_dim), np.float32)
            stats = self._launches.empty((most_rows, heads, splits, 2), np.float32)
            arrived = self._launches.counters(most_rows * head_rounds)
        for first in range(rows.start, rows.stop, step):
            num_rows = min(step, rows.stop - first)
            own = queries.rows_from(first, num_rows)
            spans, attended = (rows_from(x, first, num_rows) for x in (layout.spans, out))
            given = (*own, cache.keys, cache.values, rule.sinks, spans, layout.pages)
            results, grid = (sums, stats, arrived, attended), (head_rounds, splits, num_rows)
            self._launches.launch(
                "attention",
                "attend_rows",
                grid,
                128,
                *given,
                *results,
                *sizes,
                HEAD_DIM=key_dim,
                VALUE_DIM=value_dim,
                HEADS=together,
            )


def num_splits(run: SingleRows) -> int:
    """Blocks that divide the keys of a row of the run."""
    return -(-run.most_keys // SPLIT_KEYS)


@cached
def _divide(heads: int, kv_heads: int) -> tuple[int, int]:
    """Query heads of a block, and the blocks of all heads."""
    together = min(SPLIT_HEADS, heads // kv_heads)
    return together, kv_heads * -(-(heads // kv_heads) // together)
