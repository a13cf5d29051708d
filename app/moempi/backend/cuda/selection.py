"""Sparse attention: the positions that an indexer chooses, and attention over a copy of their rows of the cache."""

import numpy as np

from moempi.backend.cuda.attention import MOST_BLOCKS, PagedAttention, Queries, Rule
from moempi.backend.cuda.attention_layout import AttentionLayout, SingleRows, lay_out_rows
from moempi.backend.cuda.launches import SEGMENT_BYTES, Launches, rows_from
from moempi.backend.values import Array, Cache, Segment
from moempi.config.tensors import PAGE_ROWS

SCORE_BYTES = 64 << 20
"""Memory for scores; more rows are scored in several launches."""
COPY_BYTES = 64 << 20
"""Memory for the chosen rows of the cache; more rows are attended in several launches."""


class Selection:
    """The kernels of kernels/selection.cu, and attention over what they choose."""

    def __init__(self, launches: Launches, attention: PagedAttention) -> None:
        self._launches = launches
        self._device = launches.device
        self._attention = attention
        self._layouts: dict[tuple[int, int], AttentionLayout] = {}

    def positions(self, queries: Array, weights: Array, index: Cache, layout: AttentionLayout, *, top_k: int) -> Array:
        """The positions (T, top_k) of queries (T, H, dim) with weights (T, H), as `Backend.select_positions`."""
        num_rows, heads, dim = queries.shape
        positions = self._device.empty((num_rows, top_k), np.int32)
        pages = -(-max(segment.start + segment.length for segment in layout.segments) // PAGE_ROWS)
        width = pages * PAGE_ROWS
        step = max(1, min(MOST_BLOCKS, SCORE_BYTES // (4 * width)))
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            own, own_weights, spans, chosen = (
                rows_from(x, first, count) for x in (queries, weights, layout.spans, positions)
            )
            scores = self._device.empty((count, width), np.float32)
            given = (own, own_weights, index.keys, spans, layout.pages, scores, heads, dim, width)
            self._launches.launch("selection", "index_scores", (pages, count, 1), PAGE_ROWS, *given)
            self._launches.launch(
                "selection", "choose_positions", (count, 1, 1), 256, scores, spans, chosen, top_k, width
            )
        return positions

    def attend(self, queries: Array, cache: Cache, layout: AttentionLayout, positions: Array, rule: Rule) -> Array:
        """The outputs (T, H, value dim) of queries (T, H, dim) over the positions (T, k) of each."""
        num_rows, top_k = positions.shape
        width, value_dim = cache.keys.shape[-1], cache.values.shape[-1]
        out = self._launches.rows((*queries.shape[:2], value_dim))
        copied_rows = -(-top_k // PAGE_ROWS) * PAGE_ROWS
        step = max(1, COPY_BYTES // (copied_rows * width * cache.keys.itemsize))
        of_copies = self._layout_of_copies(step, top_k)
        segments = -(-width * cache.keys.itemsize // SEGMENT_BYTES)
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            own, chosen, spans, attended = (rows_from(x, first, count) for x in (queries, positions, layout.spans, out))
            keys = self._launches.rows((count * copied_rows, 1, width))
            given = (cache.keys, chosen, spans, layout.pages, keys, copied_rows, width)
            self._launches.launch("selection", "take_positions", (top_k, count, segments), 128, *given)
            copies = Cache(keys, keys[..., :value_dim])
            self._attention.attend_rows(
                Queries(own), copies, of_copies, SingleRows(range(count), top_k), rule, attended
            )
        return out

    def _layout_of_copies(self, count: int, top_k: int) -> AttentionLayout:
        """The layout of `count` rows, each of which sees `top_k` rows in pages of its own; kept for each queue."""
        key = (self._device.queue, top_k)
        if key not in self._layouts:
            pages = -(-top_k // PAGE_ROWS)
            segments = [Segment(row, 1, top_k - 1, np.arange(row * pages, (row + 1) * pages)) for row in range(count)]
            self._layouts[key] = lay_out_rows(
                segments, tile_kernel=None, upload=lambda values: self._device.upload(values.astype(np.int32))
            )
        return self._layouts[key]
