"""What the CUDA backend asks of a machine: memory, queues of work, matrix products, and launches of kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from moempi.backend.protocol import Array, Event

KERNELS = Path(__file__).with_name("kernels")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel of `kernels/<file>`, compiled with these constants: `-DNAME=value`, or `-DNAME` for None."""

    file: str
    name: str
    constants: tuple[tuple[str, int | None], ...] = ()

    @property
    def defines(self) -> tuple[str, ...]:
        """The compiler's options."""
        return tuple(f"-D{name}" if value is None else f"-D{name}={value}" for name, value in self.constants)

    @property
    def source(self) -> str:
        """The file's text with the headers that it includes in their places, each once."""
        return _with_headers(self.file, set())


def _with_headers(file: str, seen: set[str]) -> str:
    """A header that has been `seen` is empty: compilers' caches know a kernel by its text alone."""
    if file in seen:
        return ""
    seen.add(file)
    lines = (KERNELS / file).read_text().splitlines(keepends=True)
    return "".join(_with_headers(line.split('"')[1], seen) if line.startswith('#include "') else line for line in lines)


Grid = tuple[int, int, int]
Argument = Array | np.int32 | np.int64 | np.float32 | None


class Device(Protocol):
    """A machine that runs the kernels.

    What is submitted runs in the order of its queue, later; `use_queue` says to which queue. Memory that is let go is
    used again only by what the same queue gets afterwards.
    """

    name: str
    comm_buffers_on_host: bool

    def available_bytes(self) -> int:
        """Memory of all devices of this kind in the node that is free, judged by this one."""

    def use_queue(self, number: int) -> None:
        """From now on, submit to this queue."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Contiguous memory on the device, at a multiple of 256 bytes."""

    def comm_buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Contiguous memory that kernels and MPI can both address; it is let go only when nothing uses it."""

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """Let kernels address host memory that somebody else allocated, from now on."""

    def holds(self, values: Array) -> bool:
        """Whether an array lies on the device, not on the host."""

    def upload(self, values: npt.NDArray[Any]) -> Array:
        """Copy a host array to the device; the host may change it at once."""

    def download(self, values: Array) -> npt.NDArray[Any]:
        """Copy to the host. Blocks until the queue has come here."""

    def copy(self, values: Array, out: Array) -> None:
        """Submit the device's own copy from contiguous memory to contiguous memory of the same size."""

    def launch(self, kernel: Kernel, grid: Grid, threads: int, arguments: Sequence[Argument]) -> None:
        """Submit a kernel on `grid` blocks of `threads`; arrays become addresses, None a null pointer."""

    def product(self, x: Array, matrix: Array, out: Array, *, transposed: bool, accumulate: bool = False) -> None:
        """Submit out (T, N) = x (T, K) times matrix (N, K), or (K, N) when `transposed`, sums in float32.

        Rows of x may lie apart. With `accumulate` the product is added to `out`, rounded once. x and matrix are both
        bfloat16 or both float32; out is either.
        """

    def products(self, x: Array, matrices: Array, out: Array) -> None:
        """Submit out (T, H, N) = x (T, H, K) times matrices (H, K, N), for each head; x may lie apart."""

    def record_event(self) -> Event:
        """A mark behind all that this queue has been given."""
