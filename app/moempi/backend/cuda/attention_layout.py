"""Where the rows of a step are for the kernels of attention: their positions, cache pages, tiles and single rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Cache, Segment
from moempi.config.tensors import PAGE_ROWS

LEAST_TILE_ROWS = 16


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


def lay_out_rows(
    segments: Sequence[Segment], *, tile_kernel: TileKernel | None, upload: Callable[[IntArray], Array]
) -> AttentionLayout:
    """Lay out the rows of a step in one upload; `tile_kernel` takes segments of at least LEAST_TILE_ROWS rows."""
    first_pages = list(accumulate((len(segment.pages) for segment in segments), initial=0))[:-1]
    tiled = [tile_kernel is not None and segment.length >= LEAST_TILE_ROWS for segment in segments]
    pages = np.concatenate([segment.pages for segment in segments] or [np.zeros(0, np.int64)])
    # The widest rows come first, so that every row is aligned to its size.
    parts = (
        _tiles(segments, first_pages, tiled, rows=tile_kernel.rows if tile_kernel else 1),
        _spans(segments, first_pages),
        pages,
    )
    whole, ends = upload(np.concatenate([part.reshape(-1) for part in parts])), np.cumsum([part.size for part in parts])
    tiles, spans, pages = (
        whole[end - part.size : end].reshape(part.shape) for part, end in zip(parts, ends.tolist(), strict=True)
    )
    return AttentionLayout(segments, spans, pages, tiles, tile_kernel, _single_rows(segments, tiled))


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


def _spans(segments: Sequence[Segment], first_pages: Sequence[int]) -> IntArray:
    lengths = np.array([segment.length for segment in segments], np.int64)
    starts = np.array([segment.start for segment in segments], np.int64)
    first_rows = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) + np.repeat(starts - first_rows, lengths)
    spans = np.empty((len(positions), 2), np.int64)
    spans[:, 0], spans[:, 1] = positions, np.repeat(np.array(first_pages, np.int64), lengths)
    return spans


def _tiles(segments: Sequence[Segment], first_pages: Sequence[int], tiled: Sequence[bool], *, rows: int) -> IntArray:
    tiles = [
        (segment.row + first, segment.start + first, min(rows, segment.length - first), page)
        for segment, page in compress(zip(segments, first_pages, strict=True), tiled)
        for first in range(0, segment.length, rows)
    ]
    return np.array(tiles, np.int64).reshape(-1, 4)


def _single_rows(segments: Sequence[Segment], tiled: Sequence[bool]) -> Sequence[SingleRows]:
    """Runs of adjacent rows of segments that are not tiled."""
    runs: list[SingleRows] = []
    first = end = most_keys = 0
    for segment, is_tiled in zip(segments, tiled, strict=True):
        if segment.length and not is_tiled:
            if segment.row != end:
                runs.append(SingleRows(range(first, end), most_keys))
                first, most_keys = segment.row, 0
            end, most_keys = segment.row + segment.length, max(most_keys, segment.start + segment.length)
    runs.append(SingleRows(range(first, end), most_keys))
    return [run for run in runs if run.rows]
