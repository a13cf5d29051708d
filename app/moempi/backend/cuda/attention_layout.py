"""Where the rows of a step are for the kernels of attention: their positions, cache pages, tiles and single rows."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from moempi.arrays import BoolArray, IntArray
from moempi.backend.cuda.device import Device
from moempi.backend.values import Array, Cache, Segment, Segments
from moempi.config.tensors import PAGE_ROWS

LEAST_TILE_ROWS = 16
KEPT_LAYOUTS = 3
"""Layouts of rows that a queue keeps: all rows of a step, and with sparse attention the sparse ones and the others."""
NO_ROW = (-1, 0)
"""The span of a row that is not cached, of which `attend_rows` reads no key, and whose choices are not packed."""


@dataclass(frozen=True, slots=True)
class TileKernel:
    """A kernel for tiles of queries: its file, queries of a tile, threads of a block, the widths of heads it takes.

    `stages` is the number of cache pages in its dynamic shared memory.
    """

    file: str
    rows: int
    threads: int
    widths: Sequence[int]
    stages: int = 0

    def shared_bytes(self, cache: Cache) -> int:
        """Size of the dynamic shared memory of a block."""
        return self.stages * PAGE_ROWS * sum(head_dims(cache).values()) * int(cache.keys.itemsize)


WARP_TILES = TileKernel("attention_tiles", rows=64, threads=128, widths=range(16, 129, 16))
WARPGROUP_TILES = TileKernel("attention_warpgroups", rows=128, threads=256, widths=(64, 128), stages=4)


@dataclass(frozen=True, slots=True)
class SingleRows:
    """A run of adjacent rows that are in no tile, and the largest number of keys that one of them sees."""

    rows: range
    most_keys: int


@dataclass(frozen=True, slots=True)
class AttentionLayout:
    """The layout of the rows of `segments`; `spans`, `pages` and `tiles` are int32 arrays on the device.

    `spans` (T, 2): position of each row, and the index in `pages` of its sequence's first page. `tiles` (n, 4): first
    row, its position, number of rows, and the index of the first page of each tile of `tile_kernel`.
    """

    segments: Sequence[Segment]
    spans: Array
    pages: Array
    tiles: Array
    tile_kernel: TileKernel | None
    single_rows: Sequence[SingleRows]


class StepLayouts:
    """The layouts of the steps of all queues, whose segments of many rows are tiles if they are `tiled`."""

    def __init__(self, device: Device, upload: Callable[[IntArray], Array], *, tiled: bool) -> None:
        self._device, self._upload, self._tiled = device, upload, tiled
        self._kept: dict[int, deque[AttentionLayout]] = {}
        self._placed: AttentionLayout | None = None

    @contextmanager
    def placing(self, layout: AttentionLayout) -> Iterator[None]:
        """Inside a `with`, `layout` returns the layout of all segments."""
        self._placed = layout
        try:
            yield
        finally:
            self._placed = None

    @property
    def placed_spans(self) -> Array | None:
        """The spans of the rows inside `placing`, of which some may be NO_ROW."""
        return None if self._placed is None else self._placed.spans

    def of(self, cache: Cache, segments: Sequence[Segment]) -> AttentionLayout:
        """The layout of a step's rows; it is the same in all layers, so it is kept until the queue's next steps."""
        if self._placed is not None:
            return self._placed
        queue = self._device.queue
        kept = self._kept.get(queue)
        if kept is None:
            kept = self._kept[queue] = deque(maxlen=KEPT_LAYOUTS)
        for layout in kept:
            if layout.segments is segments:
                return layout
        kernel = tile_kernel(cache, has_warpgroups=self._device.has_warpgroups) if self._tiled else None
        kept.append(lay_out_rows(segments, tile_kernel=kernel, upload=self._upload))
        return kept[-1]


def lay_out_rows(
    segments: Sequence[Segment], *, tile_kernel: TileKernel | None, upload: Callable[[IntArray], Array]
) -> AttentionLayout:
    """Lay out the rows of a step in one upload; `tile_kernel` takes segments of at least LEAST_TILE_ROWS rows."""
    step = Segments.of(segments)
    tiled = (step.lengths >= LEAST_TILE_ROWS) & (tile_kernel is not None)
    # The widest rows come first, so that every row is aligned to its size.
    parts = _tiles(step, tiled, rows=tile_kernel.rows if tile_kernel else 1), _spans(step), step.pages
    whole, ends = upload(np.concatenate([part.reshape(-1) for part in parts])), np.cumsum([part.size for part in parts])
    tiles, spans, pages = (
        whole[end - part.size : end].reshape(part.shape) for part, end in zip(parts, ends.tolist(), strict=True)
    )
    return AttentionLayout(segments, spans, pages, tiles, tile_kernel, _single_rows(step, tiled))


def tile_kernel(cache: Cache, *, has_warpgroups: bool) -> TileKernel | None:
    """The kernel for tiles of queries on this device with this bfloat16 cache; None if none takes its widths."""
    kernels = (WARPGROUP_TILES, WARP_TILES) if has_warpgroups else (WARP_TILES,)
    widths = head_dims(cache).values()
    fitting = (kernel for kernel in kernels if all(width in kernel.widths for width in widths))
    return None if is_latent(cache) else next(fitting, None)


def head_dims(cache: Cache) -> dict[str, int]:
    """The widths of a head that are constants of the kernels."""
    return {"HEAD_DIM": cache.keys.shape[-1], "VALUE_DIM": cache.values.shape[-1]}


def is_latent(cache: Cache) -> bool:
    """Whether the values are the first numbers of the keys, or all of them."""
    return cache.values is cache.keys or bool(cache.values.shape[-1] < cache.keys.shape[-1])


def _spans(segments: Segments) -> IntArray:
    positions = np.arange(int(segments.lengths.sum())) + np.repeat(segments.starts - segments.rows, segments.lengths)
    return np.stack([positions, np.repeat(segments.first_pages, segments.lengths)], axis=1)


def _tiles(segments: Segments, tiled: BoolArray, *, rows: int) -> IntArray:
    tiles = [
        (segment.row + first, segment.start + first, min(rows, segment.length - first), segments.first_pages[number])
        for number, segment in ((number, segments[number]) for number in np.flatnonzero(tiled).tolist())
        for first in range(0, segment.length, rows)
    ]
    return np.array(tiles, np.int64).reshape(-1, 4)


def _single_rows(segments: Segments, tiled: BoolArray) -> Sequence[SingleRows]:
    """Runs of adjacent rows of segments that are not tiled."""
    single = np.flatnonzero(~tiled & (segments.lengths > 0))
    row_ends, num_keys = segments.rows + segments.lengths, segments.starts + segments.lengths
    borders = np.flatnonzero(segments.rows[single[1:]] != row_ends[single[:-1]]) + 1
    return [
        SingleRows(range(int(segments.rows[run[0]]), int(row_ends[run[-1]])), int(num_keys[run].max()))
        for run in np.split(single, borders)
        if len(run)
    ]
