"""A device for tests on machines without a GPU: the real kernels, compiled for the CPU under `simt.h`.

It is as asynchronous as a GPU: submitted work stays in its queue until the host waits for it or polls an event. A verb
or transfer that reads a result too early finds the pattern of fresh memory.
"""

import ctypes
import fcntl
import math
import mmap
import os
import re
import struct
import subprocess
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from moempi.arrays import narrow, widen
from moempi.backend.cuda.device import ADDRESS, FORMATS, Argument, ExpertTable, Graph, Grid, Kernel
from moempi.backend.protocol import HANDLE_BYTES, RowCopy
from simt.queue_order import QueueOrder, uses_of

HEADER, RACES = (Path(__file__).with_name(name) for name in ("simt.h", "races.cpp"))
LIBRARIES = Path(gettempdir()) / f"moempi-simt-{os.getuid()}"
LETTERS = {ADDRESS: "p", FORMATS["int"]: "i", FORMATS["long long"]: "l", FORMATS["float"]: "f", FORMATS["Experts"]: "s"}
# Unique symbols would give all libraries the shared memory of the first, whose arrays may be smaller.
OPTIONS = ["-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-fPIC", "-fno-gnu-unique", "-Wno-unknown-pragmas"]
SANITIZERS = os.environ.get("MOEMPI_SIMT_OPTIONS", "").split()  # tests/sanitize.sh
RACE_OPTIONS = ["-g1", "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "-DSIMT_RACES"]
MOST_SHARED_BYTES = 227 << 10  # of a block of an H100
FRESH = 0xFF  # every byte of memory before its first write: NaN in either precision, -1 as an index


class Resident(np.ndarray):
    """An array in the device's memory."""


class SimtDevice:
    """A `moempi.backend.cuda.device.Device` on the CPU; if `pinned`, comm buffers are host memory.

    If `eager`, work is done when it is submitted, and `peak_bytes` is the peak of a GPU; otherwise submitted work keeps
    its arrays alive. With `fault_at`, that launch ends in a fault, after which every event of the device raises. With
    an `order`, work of two queues that is not in order is an error. If it
    `finds_races`, one in shared memory ends the program (races.cpp), except under the sanitizers of tests/sanitize.sh.
    What a GPU refuses or leaves out of the graph while work is captured is an error, as is freeing what a graph uses.
    """

    name = "SIMT on the CPU"
    memory_id = "SIMT"

    def __init__(
        self,
        *,
        pinned: bool = True,
        eager: bool = False,
        fault_at: int = 0,
        has_warpgroups: bool = True,
        finds_races: bool = True,
        order: QueueOrder | None = None,
    ) -> None:
        self.comm_buffers_on_host = pinned
        self.has_warpgroups = has_warpgroups
        self._eager = eager
        self._queues: dict[int, Queue] = {}
        self._paths: dict[int, str] = {}
        self.live_bytes = self.peak_bytes = self._launches = 0
        self._fault_at = fault_at
        self._finds_races = finds_races and not SANITIZERS
        self._order = order
        self._captured: list[Work] | None = None
        self._graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self._loaded: set[Kernel] = set()
        self.use_queue(0)

    def available_bytes(self) -> int:
        return 4 << 30

    def use_queue(self, number: int) -> None:
        self.refuse("another queue")
        self.queue = number
        self._queue = self._queues.setdefault(number, Queue(eager=self._eager))

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Resident:
        self.refuse("an allocation")
        return self._resident(_fresh(shape, dtype))

    def comm_buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        self.refuse("an allocation")
        fresh = _fresh(shape, dtype)
        return fresh if self.comm_buffers_on_host else self._resident(fresh)

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """All host memory is addressable."""
        self.refuse("a registration")

    def unregister_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """All host memory is addressable."""
        self._refuse_to_free(memory)

    def holds(self, values: npt.NDArray[Any]) -> bool:
        return isinstance(values, Resident)

    def upload(self, values: npt.NDArray[Any]) -> Resident:
        self.refuse("an upload from pageable memory")
        resident, copied = self.empty(values.shape, values.dtype), values.copy()
        self.submit("upload", lambda: np.copyto(resident, copied), (resident, True))
        return resident

    def download(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self.refuse("a wait of the host")
        self._queue.run()
        return np.array(values)

    def start_download(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        self.refuse("a download to new memory")
        on_host = _fresh(values.shape, values.dtype)
        self.submit("download", lambda: np.copyto(on_host, values), (on_host, True), (values, False))
        return on_host

    def free_unused(self) -> None:
        """Memory is freed with its arrays."""

    def copy(self, values: Any, out: Any) -> None:
        self.submit("copy", lambda: np.copyto(out, values), (out, True), (values, False))

    def allocate_shared(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Resident:
        """The memory is a file; the handle is its path."""
        self.refuse("an allocation")
        LIBRARIES.mkdir(mode=0o700, exist_ok=True)
        number, path = tempfile.mkstemp(dir=LIBRARIES)
        with os.fdopen(number, "wb") as file:
            file.write(bytes([FRESH]) * max(1, math.prod(shape) * np.dtype(dtype).itemsize))
        values = self._resident(_mapped(path, shape, dtype))
        weakref.finalize(values.base, os.unlink, path)
        self._paths[values.ctypes.data] = path
        return values

    def handle(self, values: Resident) -> bytes:
        return self._paths[values.ctypes.data].encode().ljust(HANDLE_BYTES, b"\0")

    def map_shared(self, handle: bytes, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Resident:
        """The memory counts on the device that allocated it."""
        self.refuse("an allocation")
        return _mapped(handle.rstrip(b"\0").decode(), shape, dtype).view(Resident)

    def unmap_shared(self, values: Resident) -> None:
        self._refuse_to_free(values)
        for queue in self._queues.values():
            queue.run()

    def copy_rows(self, copy: RowCopy, target: Any) -> None:
        rows = copy.source[copy.source_first : copy.source_first + copy.num_rows]
        self.copy(rows, target[copy.first : copy.first + copy.num_rows])

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
        """An `early` launch is an ordinary one."""
        assert shared_bytes <= MOST_SHARED_BYTES
        if kernel not in self._loaded:
            self.refuse("a first launch")
            self._loaded.add(kernel)
        self._launches += 1
        if self._launches == self._fault_at:
            self.submit("fault", _fault)
            return
        run = getattr(_library(kernel, finds_races=self._finds_races), f"launch_{kernel.name}")
        shape = (ctypes.c_uint * 7)(*grid, threads, 1, 1, shared_bytes)
        formats, offsets = _layout(kernel)
        letters = "".join(LETTERS[format] for format in formats)
        words = ctypes.create_string_buffer(struct.pack("=" + "".join(formats), *map(_word, arguments)))
        first = ctypes.addressof(words)
        addresses = (ctypes.c_void_p * len(formats))(*(first + offset for offset in offsets))
        keep = (words, arguments)
        work = partial(_run, run, shape, addresses, letters, keep)
        finds_uses = self._order is not None or self._captured is not None
        self.submit(kernel.name, work, *(uses_of(kernel, arguments) if finds_uses else ()))

    def product(self, x: Any, matrix: Any, out: Any, *, transposed: bool) -> None:
        def run() -> None:
            held = _floats(matrix)
            product = _floats(x) @ (held if transposed else held.T)
            _store(out, product)

        assert x.dtype == matrix.dtype
        self.submit("product", run, (x, False), (matrix, False), (out, True))

    def products(self, x: Any, matrices: Any, out: Any) -> None:
        def run() -> None:
            _store(out, (_floats(x).transpose(1, 0, 2) @ _floats(matrices)).transpose(1, 0, 2))

        self.submit("products", run, (x, False), (matrices, False), (out, True))

    def capture(self, submit: Callable[[], object]) -> Graph:
        self.refuse("another capture")
        self._captured = []
        try:
            submit()
            graph = Graph(self._captured, [used for work in self._captured for used, _ in work.uses])
        finally:
            self._captured = None
        self._graphs.add(graph)
        return graph

    def launch_graph(self, graph: Graph) -> None:
        def run() -> None:
            for work in graph.work:
                work.run()

        self.refuse("another graph")
        self.submit("graph", run, *(use for work in graph.work for use in work.uses))

    def refuse(self, what: str) -> None:
        """Raise RuntimeError while work is captured."""
        if self._captured is not None:
            raise RuntimeError(f"{what} under capture")

    def _refuse_to_free(self, values: npt.NDArray[Any]) -> None:
        """Raise RuntimeError if a graph uses memory of an array, or while work is captured."""
        self.refuse("a free")
        if any(np.may_share_memory(used, values) for graph in self._graphs for used in graph.used):
            raise RuntimeError("a graph uses memory that is freed")

    def record_event(self) -> "QueueEvent":
        self.refuse("an event")
        return QueueEvent(self._queue, self._queue.submitted, self.refuse)

    def submit(self, name: str, work: Callable[[], object], *uses: tuple[Any, bool]) -> None:
        """Submit work that uses these arrays, and writes some; while work is captured, keep it for the graph."""
        if self._captured is not None:
            self._captured.append(Work(work, uses))
            return
        if self._order is not None:
            done = {number: queue.done for number, queue in self._queues.items()}
            self._order.submit(self.queue, self._queue.submitted + 1, name, done, uses)
        self._queue.submit(work)

    def _resident(self, values: npt.NDArray[Any]) -> Resident:
        """Count the memory until the array and its views are freed."""
        self.live_bytes += values.nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(values.base, self._release, values.nbytes)
        return values.view(Resident)

    def _release(self, num_bytes: int) -> None:
        self.live_bytes -= num_bytes


class Work(NamedTuple):
    """Work that was recorded, and the arrays that it uses, with whether it writes them."""

    run: Callable[[], object]
    uses: Sequence[tuple[Any, bool]]


class Queue:
    """Work that is submitted but not done."""

    def __init__(self, *, eager: bool) -> None:
        self.submitted = 0
        self._eager = eager
        self._waiting: deque[Callable[[], object]] = deque()

    def submit(self, work: Callable[[], object]) -> None:
        self._waiting.append(work)
        self.submitted += 1
        if self._eager:
            self.run()

    def run(self, until: int | None = None) -> None:
        """Do all submitted work, or the first `until` pieces."""
        while self._waiting and (until is None or self.done < until):
            self._waiting[0]()  # a fault stays, so that the queue raises again and again
            self._waiting.popleft()

    @property
    def done(self) -> int:
        return self.submitted - len(self._waiting)


class QueueEvent:
    """An event behind the first `count` pieces of work; each poll does one piece."""

    def __init__(self, queue: Queue, count: int, refuse: Callable[[str], None]) -> None:
        self._queue = queue
        self._count = count
        self._refuse = refuse

    def is_done(self) -> bool:
        self._refuse("a query of an event")
        self._queue.run(min(self._queue.done + 1, self._count))
        return self._queue.done >= self._count

    def synchronize(self) -> None:
        self._refuse("a wait of the host")
        self._queue.run(self._count)


def _run(run: Any, shape: Any, addresses: Any, letters: str, _: Any) -> None:
    """Run a kernel; the last argument is what its addresses point to."""
    run(shape, addresses, letters.encode())


def _fault() -> None:
    raise RuntimeError("an illegal memory access was encountered")


def _mapped(path: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    with Path(path).open("r+b") as file:
        memory = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
    return memory[: math.prod(shape) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


def _fresh(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    # Nothing lies between an array and what a sanitizer puts beside it.
    memory = np.full(math.prod(shape) * np.dtype(dtype).itemsize, FRESH, np.uint8)
    return memory.view(dtype).reshape(shape)


def _word(argument: Argument) -> Any:
    """An address, or the number itself."""
    if isinstance(argument, ExpertTable):
        return argument.pack(_word)
    if isinstance(argument, np.ndarray):
        return argument.ctypes.data
    return 0 if argument is None else argument


def _floats(values: Any) -> npt.NDArray[np.float64]:
    held = np.asarray(values)
    return (widen(held) if held.dtype == np.uint16 else held).astype(np.float64)


def _store(out: Any, values: npt.NDArray[np.float64]) -> None:
    floats = values.astype(np.float32)
    out[...] = narrow(floats) if out.dtype == np.uint16 else floats


@cache
def _layout(kernel: Kernel) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The formats and offsets of the parameters, for which the kernel's source is read."""
    return kernel.parameters, kernel.offsets


@cache
def _library(kernel: Kernel, *, finds_races: bool) -> ctypes.CDLL:
    """The kernel's file with its constants, compiled once for all processes of this user."""
    names = re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", kernel.source)
    launchers = "".join(
        f'extern "C" void launch_{name}(const unsigned* shape, void** values, const char* letters) '
        f"{{ simt::launch({name}, shape, values, letters); }}\n"
        for name in names
    )
    text = f'#line 1 "{HEADER.name}"\n{HEADER.read_text()}\n{kernel.source}\n{launchers}'.replace("#pragma once", "")
    name, races = Path(kernel.file).stem, RACE_OPTIONS if finds_races else []
    compiled = _build(f"{name}.o", text, [*OPTIONS, *SANITIZERS, *races, *kernel.defines, "-c"])
    others = [] if not finds_races else [_build("races.o", RACES.read_text(), [*OPTIONS, "-c"])]
    linked = [*OPTIONS, *SANITIZERS, "-shared", "-Wl,-Bsymbolic", str(compiled), *map(str, others)]
    return ctypes.CDLL(str(_build(f"{name}.so", "", linked)))


def _build(name: str, text: str, options: Sequence[str]) -> Path:
    """The file that g++ makes of a source with these options; one process makes it, the others wait."""
    made = LIBRARIES / f"{xxhash.xxh3_64_hexdigest(''.join([text, *options]).encode())}-{name}"
    if made.exists():
        return made
    LIBRARIES.mkdir(mode=0o700, exist_ok=True)
    with made.with_suffix(f"{made.suffix}.lock").open("w") as lock, TemporaryDirectory(dir=LIBRARIES) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            built = Path(folder) / name
            source = [] if not text else ["-x", "c++", "-"]
            subprocess.run(["g++", *options, "-o", str(built), *source], input=text, text=True, check=True)
            built.replace(made)
    return made
