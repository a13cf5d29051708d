"""Launches of the kernels: their grids and blocks for rows, vectors and flat arrays."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import prod

import numpy as np
import numpy.typing as npt

from moempi.backend.cuda.device import Argument, Device, Grid, find_kernel
from moempi.backend.values import Array

SEGMENT_BYTES = 8192
"""Bytes of a row per block of the kernels that copy rows; equals SEGMENT_BYTES of kernels/rows.cuh."""
BUS_BLOCKS = 32
"""Blocks that copy rows over the bus at a time: more would wait there in place of other lanes' kernels."""
FLAT_NUMBERS = 2048
"""Numbers per block of a flat kernel."""
ROUTER_ROWS = 4
"""Rows per block of kernels/router.cu."""
ALIGNMENT = 256
"""Of the addresses that `Device.empty` returns, in bytes."""

Allocate = Callable[[tuple[int, ...], npt.DTypeLike], Array]


class Arena:
    """Allocates from the front of `memory` (bytes,) to its end; without memory by `allocate`, to learn how many bytes.

    Nothing is freed before the whole memory is. Raises RuntimeError beyond its end.
    """

    def __init__(self, allocate: Allocate, memory: Array | None = None) -> None:
        self.taken_bytes = 0
        self._allocate, self._memory = allocate, memory

    def __call__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Allocate contiguous memory."""
        first, num_bytes = self.taken_bytes, prod(shape) * np.dtype(dtype).itemsize
        self.taken_bytes += -(-num_bytes // ALIGNMENT) * ALIGNMENT
        if self._memory is None:
            return self._allocate(shape, dtype)
        if self.taken_bytes > len(self._memory):
            raise RuntimeError(f"an arena of {len(self._memory)} bytes has no {num_bytes} bytes from {first} on")
        return self._memory[first : first + num_bytes].view(dtype).reshape(shape)


class Launches:
    """Submits kernels to a device, compiled for rows of one type: bfloat16 bits (uint16) or float32."""

    def __init__(self, device: Device, *, row_dtype: npt.DTypeLike) -> None:
        self.device = device
        self._row_dtype = np.dtype(row_dtype)
        is_float32 = self._row_dtype == np.float32
        self._constants: tuple[tuple[str, int | None], ...] = (("FLOAT32_ROWS", None),) if is_float32 else ()
        self._counters: dict[int, Array] = {}
        self._allocate: Allocate = device.empty

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Allocate memory of the device as `Device.empty`; within `allocating`, from there."""
        return self._allocate(shape, dtype)

    def rows(self, shape: tuple[int, ...]) -> Array:
        """Allocate rows."""
        return self._allocate(shape, self._row_dtype)

    @contextmanager
    def allocating(self, allocate: Allocate) -> Iterator[None]:
        """Allocate by `allocate` inside a `with`."""
        before, self._allocate = self._allocate, allocate
        try:
            yield
        finally:
            self._allocate = before

    def counters(self, needed: int) -> Array:
        """At least `needed` counters (int32) of the queue, which are zero between launches.

        A kernel counts in them the blocks or warps that have written their sums, and leaves zeros. The memory is kept;
        it grows by doubling.
        """
        queue = self.device.queue
        if queue not in self._counters or len(self._counters[queue]) < needed:
            self._counters[queue] = self.device.upload(np.zeros(1 << (needed - 1).bit_length(), np.int32))
        return self._counters[queue]

    def widened(self, rows: Array) -> Array:
        """bfloat16 bits as float32."""
        out = self.empty(rows.shape, np.float32)
        self.flat("widen_rows", prod(out.shape), rows, out)
        return out

    def copy(self, x: Array, out: Array) -> None:
        """Copy rows of 2 or 4 bytes a number, which may be strided, to contiguous memory, as 2-byte halves."""
        halves = x.itemsize // 2
        heads, width, *strides = (int(size) for size in extents(x))
        sizes = (heads, width * halves, *(stride * halves for stride in strides))
        kernel = find_kernel("elementwise.cu", "copy_columns")
        if len(x):
            end = (0, width * halves)
            self.device.launch(kernel, (len(x) * heads, 1, 1), block_threads(width * halves), (x, out, *sizes, *end))

    def by_router(self, name: str, num_experts: int, *arguments: Argument) -> None:
        """Launch one warp per row of the first argument."""
        rows = len(arguments[0])  # type: ignore[arg-type]
        self.launch("router", name, (-(-rows // ROUTER_ROWS), 1, 1), 128, *arguments, EXPERTS=num_experts)

    def by_vector(self, file: str, name: str, out: Array, *arguments: Argument) -> None:
        """Launch one block per vector of `out`."""
        width = out.shape[-1]
        self.launch(file, name, (prod(out.shape) // width, 1, 1), block_threads(width), *arguments)

    def weight_type(self, weight: Array | None) -> dict[str, int]:
        """The constants of kernels for the type of a norm's weights, which may be float32 beside bfloat16 rows."""
        is_wider = weight is not None and weight.dtype == np.float32 and self._row_dtype != np.float32
        return {"FLOAT32_WEIGHTS": 1} if is_wider else {}

    def by_norm(self, name: str, out: Array, *arguments: Argument, weight: Array) -> None:
        """Launch one block per vector of `out`; a thread takes several eights, whose loads overlap."""
        width = out.shape[-1]
        grid, constants = (prod(out.shape) // width, 1, 1), self.weight_type(weight)
        self.launch("norm", name, grid, norm_threads(width), *arguments, **constants)

    def by_segment(self, file: str, name: str, out: Array, *arguments: Argument) -> None:
        """Launch one block per SEGMENT_BYTES of each row of `out`."""
        self.launch(file, name, (len(out), _segments(out), 1), 128, *arguments)

    def over_bus(self, file: str, name: str, out: Array, *arguments: Argument) -> None:
        """Launch at most about BUS_BLOCKS blocks, each for SEGMENT_BYTES of several rows of `out`."""
        segments = _segments(out)
        self.launch(file, name, (min(len(out), -(-BUS_BLOCKS // max(1, segments))), segments, 1), 128, *arguments)

    def flat(self, name: str, count: int, *arguments: Argument) -> None:
        """Launch one thread per eight of `count` numbers; `count` is the kernel's last argument."""
        self.launch("elementwise", name, (-(-count // FLAT_NUMBERS), 1, 1), 256, *arguments, count)

    def launch(self, file: str, name: str, grid: Grid, threads: int, *arguments: Argument, **constants: int) -> None:
        """Launch a kernel with these compile-time constants; an empty grid launches nothing."""
        if all(grid):
            kernel = find_kernel(f"{file}.cu", name, (*self._constants, *constants.items()))
            self.device.launch(kernel, grid, threads, arguments)


def _segments(rows: Array) -> int:
    """How many times SEGMENT_BYTES a row has, rounded up."""
    return int(-(-prod(rows.shape[1:]) * rows.itemsize // SEGMENT_BYTES))


def rows_from(whole: Array, first: int, count: int) -> Array:
    """Rows [first, first + count); a view takes the host longer than the comparison."""
    return whole if count == len(whole) else whole[first : first + count]


@cache
def block_threads(width: int) -> int:
    """Threads of a block for `width` numbers, eight per thread: whole warps, at most 1,024."""
    return int(min(1024, 32 * -(-width // 256)))


@cache
def norm_threads(width: int) -> int:
    """Threads of a block that normalizes a vector of `width` numbers by kernels/norm.cuh."""
    return min(512, block_threads(-(-width // 4)))


def extents(x: Array) -> tuple[int, int, int, int]:
    """Heads, width, row stride and head stride, in numbers, of (T, D) or (T, H, D)."""
    shape, strides, size = x.shape, x.strides, x.itemsize
    if len(shape) == 3:
        return shape[1], shape[2], strides[0] // size, strides[1] // size
    return 1, shape[1], strides[0] // size, 0
