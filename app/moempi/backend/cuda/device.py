"""The machine below the CUDA backend: memory, queues of work, matrix products, and launches of kernels."""

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moempi.backend.protocol import Event, RowCopy
from moempi.backend.values import Array

KERNELS = Path(__file__).with_name("kernels")


MOST_EXPERTS = 32
"""Experts of the struct Experts of kernels/few_rows.cu."""
FORMATS = {"int": "i4x", "long long": "q", "float": "f4x", "Experts": f"{MOST_EXPERTS * (2 * 8 + 3 * 4)}s"}
"""Format of a kernel's parameter in the module `struct`, padded to a multiple of 8 bytes; a pointer is an ADDRESS."""
ADDRESS = "Q"
WORKSPACE_BYTES = 32 << 20
"""Memory of a queue for products under capture: what cuBLAS recommends on compute capability 9.0."""
PREEMPTIBLE = frozenset(
    ("attend_rows", "attend_tiles", "index_scores", "choose_positions", "take_positions", "delta_rule", "state_space")
)
"""Kernels of attention and of recurrent states, which may take long: their work rises with the length of sequences."""


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A kernel of `kernels/<file>`, compiled with these constants: `-DNAME=value`, or `-DNAME` for None."""

    file: str
    name: str
    constants: tuple[tuple[str, int | None], ...] = ()

    @property
    def defines(self) -> tuple[str, ...]:
        """Compiler options for the constants."""
        return tuple(f"-D{name}" if value is None else f"-D{name}={value}" for name, value in self.constants)

    @property
    def is_preemptible(self) -> bool:
        """Whether its blocks that have not begun give way to kernels of other queues that are not preemptible."""
        return self.name in PREEMPTIBLE

    @property
    def parameter_types(self) -> tuple[str, ...]:
        """The C++ type of each parameter, from the source."""
        found = re.search(rf"__global__ void (?:__launch_bounds__\([^)]*\)\s*)?{self.name}\(([^)]*)\)", self.source)
        assert found, f"{self.file} has no kernel {self.name}"
        return tuple(" ".join(parameter.split()[:-1]) for parameter in found[1].split(","))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The format of each parameter."""
        return tuple(ADDRESS if "*" in given else FORMATS[given] for given in self.parameter_types)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each parameter begins when all are packed, in bytes."""
        return tuple(accumulate((struct.calcsize(f"={given}") for given in self.parameters[:-1]), initial=0))

    @property
    def source(self) -> str:
        """The text of the file, with each header that it includes inserted once."""
        return _with_headers(self.file, set())


@cache
def find_kernel(file: str, name: str, constants: tuple[tuple[str, int | None], ...] = ()) -> Kernel:
    """The one Kernel of these constants, so that devices know a kernel again by its identity."""
    return Kernel(file, name, constants)


def _with_headers(file: str, seen: set[str]) -> str:
    """Headers are inserted because compiler caches identify a kernel by its text; one that was `seen` becomes empty.

    Compilers name the place of an error by the lines `#line`.
    """
    if file in seen:
        return ""
    seen.add(file)
    pieces = [f'#line 1 "{file}"\n']
    for number, line in enumerate((KERNELS / file).read_text().splitlines(keepends=True), start=1):
        included = line.startswith('#include "')
        pieces += [_with_headers(line.split('"')[1], seen), f'#line {number + 1} "{file}"\n'] if included else [line]
    return "".join(pieces)


class ExpertTable(NamedTuple):
    """The argument `Experts` of kernels/few_rows.cu: expert e has `counts[e]` rows of x, from `x_starts[e]` on."""

    matrices: Sequence[Array]
    biases: Sequence[Array | None]
    x_starts: Sequence[int]
    out_starts: Sequence[int]
    counts: Sequence[int]

    def pack(self, address: Callable[[Array | None], int]) -> bytes:
        """The struct; `address` returns an array's address on the device."""
        number = len(self.counts)
        unused = MOST_EXPERTS - number
        addresses, starts = f"{number}Q{8 * unused}x", f"{number}i{4 * unused}x"
        return struct.pack(
            f"={2 * addresses}{3 * starts}",
            *map(address, self.matrices),
            *map(address, self.biases),
            *self.x_starts,
            *self.out_starts,
            *self.counts,
        )


Grid = tuple[int, int, int]
Argument = Array | ExpertTable | int | float | None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Graph:
    """Work that a device has recorded, in the device's own form, and what it uses, which stays alive with it."""

    work: Any
    used: Sequence[object]


class Device(Protocol):
    """A machine that runs the kernels.

    Work is submitted to the current queue and runs later, in the order of its queue. A kernel that is preemptible gives
    way to the work of other queues. Freed memory is reused only by work submitted to the same queue afterwards.
    """

    name: str
    queue: int
    """The number of the current queue."""
    comm_buffers_on_host: bool
    has_warpgroups: bool
    """Whether it runs kernels/warpgroup.cuh."""

    @property
    def memory_id(self) -> str:
        """Identifies the device's memory among all of the node."""

    def available_bytes(self) -> int:
        """Free memory of the device in bytes."""

    def use_queue(self, number: int) -> None:
        """Make `number` the current queue."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Allocate contiguous memory on the device, aligned to 256 bytes."""

    def comm_buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Allocate contiguous memory that both kernels and MPI can address; freeing it waits for the device."""

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """Make host memory that the caller allocated addressable by kernels, until it is unregistered.

        Empty memory needs nothing.
        """

    def unregister_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """Undo `register_host_memory`; blocks until the device is done with all work."""

    def holds(self, values: Array) -> bool:
        """Whether an array is in device memory."""

    def upload(self, values: npt.NDArray[Any]) -> Array:
        """Copy a host array to the device; the host may change it at once."""

    def download(self, values: Array) -> npt.NDArray[Any]:
        """Copy to the host. Blocks the host until all work submitted to the queue before is done."""

    def start_download(self, values: Array) -> npt.NDArray[Any]:
        """Submit a copy to new host memory.

        The memory holds the values once an event recorded behind the copy is done.
        """

    def free_unused(self) -> None:
        """Return memory that only completed work used to the system."""

    def copy(self, values: Array, out: Array) -> None:
        """Submit a copy between contiguous arrays of equal size."""

    def allocate_shared(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Allocate device memory that other processes of the node can map; freeing it waits for the device."""

    def handle(self, values: Array) -> bytes:
        """The handle (HANDLE_BYTES) of memory of `allocate_shared`; raises ConfigError if the device refuses."""

    def map_shared(self, handle: bytes, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Map memory that another process allocated; raises ConfigError if the device refuses."""

    def unmap_shared(self, values: Array) -> None:
        """Undo `map_shared`; blocks until the device is done with all work."""

    def copy_rows(self, copy: RowCopy, target: Array) -> None:
        """Submit a copy of rows between contiguous arrays of equal rows, each of this device or mapped."""

    def launch(
        self,
        kernel: Kernel,
        grid: Grid,
        threads: int,
        arguments: Sequence[Argument],
        *,
        shared_bytes: int = 0,
        early: bool = False,
    ) -> None:
        """Submit a kernel on `grid` blocks of `threads` threads; arrays become addresses, None a null pointer.

        `shared_bytes` is the size of the block's dynamic shared memory, the same in every launch of a kernel. A kernel
        that is `early` waits by itself for the work before it (kernels/early_launch.cuh), which needs
        compute capability 9.0.
        """

    def product(self, x: Array, matrix: Array, out: Array, *, transposed: bool) -> None:
        """Submit out (T, N) = x (T, K) times matrix (N, K), or (K, N) when `transposed`; sums are in float32.

        Rows of x may be strided. x and matrix are both bfloat16 or both float32; out is either.
        """

    def products(self, x: Array, matrices: Array, out: Array) -> None:
        """Submit out (T, H, N) = x (T, H, K) times matrices (H, K, N), head by head; x may be strided."""

    def capture(self, submit: Callable[[], object]) -> Graph:
        """Record the launches, products and copies that `submit` submits to the current queue, and do none of them.

        `submit` must not allocate or free, upload or download, record or await an event, or use another queue, and what
        its work makes on first use must be made before. Raises what it raises, then nothing is recorded.
        """

    def launch_graph(self, graph: Graph) -> None:
        """Submit recorded work to the current queue, with the addresses, numbers and grids of the recording."""

    def record_event(self) -> Event:
        """Record an event behind all work in the current queue."""
