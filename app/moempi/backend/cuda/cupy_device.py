"""An NVIDIA GPU through CuPy: memory and streams, products by cuBLAS, kernels of `compiled_kernel`."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import cupy
import numpy as np
import numpy.typing as npt
from cupy_backends.cuda.libs import cublas

from moempi.backend.cuda import cublas_calls
from moempi.backend.cuda.compiled_kernel import CompiledKernel, instantiate_graph
from moempi.backend.cuda.device import WORKSPACE_BYTES, Argument, Graph, Grid, Kernel
from moempi.backend.cuda.peer_memory import COPY_QUEUE
from moempi.backend.protocol import RowCopy
from moempi.backend.values import Array
from moempi.errors import ConfigError

REAL = {np.dtype(np.uint16): 14, np.dtype(np.float32): 0}
"""cudaDataType of bfloat16 bits and of float."""
COMPUTE_32F, DEFAULT_ALGORITHM = 68, -1
PLAIN, TRANSPOSED = 0, 1
FACTORS = np.array([1, 0], np.float32)
ONE, ZERO = FACTORS.ctypes.data, FACTORS[1:].ctypes.data
"""Addresses of the factors of a product and of the results before it."""
BY_ADDRESS = 4
"""cudaMemcpyDefault: the addresses say which memory they are in."""
NOT_READY = 600
"""cudaErrorNotReady: work before the event is not done."""
QUEUE_PRIORITY = -1
"""Priority of a queue's work; preemptible kernels have 0, the least, as lower numbers are higher priorities."""
STAGED_BYTES = 16 << 20
"""Largest array that is uploaded through pinned memory, which CuPy rounds up to a power of two and keeps."""


class CupyDevice:
    """One GPU; queues are non-blocking streams, each with its own cuBLAS handle.

    With a handle for each stream, the bits of a product do not depend on what other streams do (cuBLAS, "Results
    reproducibility"). A preemptible kernel is launched on its queue's stream too, with a lower priority of its own, so
    that it costs no event and changes no order.

    If `pinned`, comm buffers are pinned host memory, which the GPU reads and writes over the bus, for an MPI that takes
    no device pointers; otherwise they are device memory. With `captures`, products are submitted by
    `cublas_calls`, so that they can be captured. Raises ConfigError below compute capability 8.0.
    """

    def __init__(self, number: int, *, pinned: bool, captures: bool = False) -> None:
        self._device = cupy.cuda.Device(number)
        self._device.use()
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        capability = f"{properties['major']}.{properties['minor']}"
        self.name = f"{properties['name'].decode()} (GPU {number}, compute capability {capability})"
        if properties["major"] < 8:
            raise ConfigError(
                f'run.backend = "cupy": {self.name} has no bfloat16; it takes compute capability 8.0 or more'
            )
        self.comm_buffers_on_host = pinned
        self.has_warpgroups = capability == "9.0"
        self._architecture = "sm_90a" if self.has_warpgroups else f"sm_{capability.replace('.', '')}"
        self._kernels: dict[Kernel, CompiledKernel] = {}
        self._captures = captures
        self._library: Any = cublas_calls.functions() if captures else cublas
        self._used: list[object] | None = None
        self._uuid = properties.get("uuid", b"")[:16].hex()
        self._queues: dict[int, tuple[cupy.cuda.Stream, int]] = {}
        self._workspaces: list[Array] = []
        self.use_queue(0)

    @property
    def memory_id(self) -> str:
        """The PCI address, and the UUID, which differs for the parts of a divided GPU."""
        return f"{self._device.pci_bus_id} {self._uuid}"

    def available_bytes(self) -> int:
        return int(self._device.mem_info[0])

    def use_queue(self, number: int) -> None:
        if self._used is not None:
            raise RuntimeError("the work of another queue cannot be captured")
        if number not in self._queues:
            stream, handle = cupy.cuda.Stream(non_blocking=True, priority=QUEUE_PRIORITY), cublas.create()
            cublas.setStream(handle, stream.ptr)
            if self._captures and number != COPY_QUEUE:
                self._workspaces.append(self.allocate_shared((WORKSPACE_BYTES,), np.uint8))
                cublas_calls.set_workspace(handle, self._workspaces[-1])
            self._queues[number] = (stream, handle)
        self.queue = number
        self._stream, self._handle = self._queues[number]
        self._stream.use()

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """From CuPy's pool, which calls the driver only until it holds enough for the largest step."""
        return cupy.ndarray(shape, dtype)

    def comm_buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Not from a pool, because freeing it must wait for the device."""
        count = int(np.prod(shape))
        num_bytes = max(1, count * np.dtype(dtype).itemsize)
        if not self.comm_buffers_on_host:
            return self.allocate_shared(shape, dtype)
        return np.asarray(_PinnedMemory(num_bytes)).view(dtype)[:count].reshape(shape)

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        if memory.nbytes:  # the driver refuses an empty range
            cupy.cuda.runtime.hostRegister(memory.ctypes.data, memory.nbytes, cupy.cuda.runtime.hostAllocPortable)

    def unregister_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        if memory.nbytes:
            cupy.cuda.runtime.deviceSynchronize()
            cupy.cuda.runtime.hostUnregister(memory.ctypes.data)

    def holds(self, values: Array) -> bool:
        return isinstance(values, cupy.ndarray)

    # CuPy allocates memory for its current stream, and uploads on it. A call that takes a stream may leave the null
    # stream as the current one, for which no queue waits: so copies name their stream themselves.

    def upload(self, values: npt.NDArray[Any]) -> Array:
        """Up to STAGED_BYTES through pinned memory that CuPy keeps until the copy is done; blocks for larger arrays."""
        values = np.ascontiguousarray(values)
        if values.nbytes <= STAGED_BYTES:
            return cupy.asarray(values)
        resident = cupy.ndarray(values.shape, values.dtype)
        resident.data.copy_from_host_async(values.ctypes.data, values.nbytes, self._stream)
        self._stream.synchronize()
        return resident

    def download(self, values: Array) -> npt.NDArray[Any]:
        on_host = self.start_download(values)
        self._stream.synchronize()
        return on_host.copy()

    def start_download(self, values: Array) -> npt.NDArray[Any]:
        """To pinned memory of CuPy's pool, which returns there with the array."""
        if not values.size:
            return np.empty(values.shape, values.dtype)
        memory = cupy.cuda.alloc_pinned_memory(values.nbytes)
        on_host = np.frombuffer(memory, values.dtype, values.size).reshape(values.shape)
        held = values if values.flags.c_contiguous else cupy.ascontiguousarray(values)
        held.data.copy_to_host_async(on_host.ctypes.data, held.nbytes, self._stream)
        return on_host

    def free_unused(self) -> None:
        cupy.cuda.alloc_pinned_memory(1)  # CuPy looks for completed uploads only when it allocates
        cupy.get_default_pinned_memory_pool().free_all_blocks()
        cupy.get_default_memory_pool().free_all_blocks()

    def copy(self, values: Array, out: Array) -> None:
        self._keep(values, out)
        out.data.copy_from_device_async(values.data, values.nbytes, self._stream)

    def allocate_shared(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """Beside CuPy's pool, whose unused memory is freed if there is no other."""
        num_bytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        try:
            memory = cupy.cuda.Memory(num_bytes)
        except cupy.cuda.runtime.CUDARuntimeError:
            self.free_unused()
            memory = cupy.cuda.Memory(num_bytes)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    def handle(self, values: Array) -> bytes:
        try:
            handle: bytes = cupy.cuda.runtime.ipcGetMemHandle(values.data.ptr)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise ConfigError(f"GPU memory cannot be shared with other ranks: {error}") from error
        return handle

    def map_shared(self, handle: bytes, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        try:
            address = cupy.cuda.runtime.ipcOpenMemHandle(handle)
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise ConfigError(f"the GPU memory of another rank cannot be mapped: {error}") from error
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = cupy.cuda.UnownedMemory(address, num_bytes, None, self._device.id)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    def unmap_shared(self, values: Array) -> None:
        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.runtime.ipcCloseMemHandle(values.data.ptr)

    def copy_rows(self, copy: RowCopy, target: Array) -> None:
        self._keep(copy.source, target)
        row_bytes = target.strides[0]
        to, source = target.data.ptr + copy.first * row_bytes, copy.source.data.ptr + copy.source_first * row_bytes
        cupy.cuda.runtime.memcpyAsync(to, source, copy.num_rows * row_bytes, BY_ADDRESS, self._stream.ptr)

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
        compiled = self._kernels.get(kernel)
        if compiled is None:
            compiled = self._kernels[kernel] = CompiledKernel(
                kernel, architecture=self._architecture, shared_bytes=shared_bytes
            )
        self._keep(*arguments)
        compiled(grid, threads, self._stream.ptr, arguments, early=early)

    def product(self, x: Array, matrix: Array, out: Array, *, transposed: bool) -> None:
        """The arrays of cuBLAS are column-major, so it computes out' = matrix x'."""
        self._keep(x, matrix, out)
        rows, outputs = out.shape
        self._library.gemmEx(
            self._handle,
            PLAIN if transposed else TRANSPOSED,
            PLAIN,
            outputs,
            rows,
            x.shape[1],
            ONE,
            matrix.data.ptr,
            REAL[matrix.dtype],
            matrix.shape[1],
            x.data.ptr,
            REAL[x.dtype],
            x.strides[0] // x.itemsize,
            ZERO,
            out.data.ptr,
            REAL[out.dtype],
            outputs,
            COMPUTE_32F,
            DEFAULT_ALGORITHM,
        )

    def products(self, x: Array, matrices: Array, out: Array) -> None:
        self._keep(x, matrices, out)
        rows, heads, outputs = out.shape
        kind = REAL[x.dtype]
        self._library.gemmStridedBatchedEx(
            self._handle,
            PLAIN,
            PLAIN,
            outputs,
            rows,
            x.shape[2],
            ONE,
            matrices.data.ptr,
            kind,
            outputs,
            x.shape[2] * outputs,
            x.data.ptr,
            kind,
            x.strides[0] // x.itemsize,
            x.strides[1] // x.itemsize,
            ZERO,
            out.data.ptr,
            kind,
            heads * outputs,
            outputs,
            heads,
            COMPUTE_32F,
            DEFAULT_ALGORITHM,
        )

    def capture(self, submit: Callable[[], object]) -> Graph:
        """In the mode in which CUDA refuses no allocation or free, as Python may free memory at any time."""
        runtime, stream = cupy.cuda.runtime, self._stream.ptr
        used: list[object] = []
        runtime.streamBeginCapture(stream, runtime.streamCaptureModeRelaxed)
        self._used = used
        try:
            submit()
        except BaseException:
            with suppress(cupy.cuda.runtime.CUDARuntimeError):  # of a capture that the error has ended
                runtime.graphDestroy(runtime.streamEndCapture(stream))
            raise
        finally:
            self._used = None
        graph = runtime.streamEndCapture(stream)
        try:
            return Graph(Executable(instantiate_graph(graph)), used)
        finally:
            runtime.graphDestroy(graph)

    def launch_graph(self, graph: Graph) -> None:
        cupy.cuda.runtime.graphLaunch(graph.work.address, self._stream.ptr)

    def _keep(self, *arguments: object) -> None:
        """Keep the arrays of work that is captured, for its graph."""
        if self._used is not None:
            self._used += arguments

    def record_event(self) -> "StreamEvent":
        return StreamEvent(self._stream.record(cupy.cuda.Event(disable_timing=True)))


class _PinnedMemory:
    """Page-locked host memory, which has the same address on the GPU."""

    _address = 0

    def __init__(self, num_bytes: int) -> None:
        num_bytes = -(-num_bytes // 4) * 4  # a multiple of every element size
        self._address = cupy.cuda.runtime.hostAlloc(num_bytes, cupy.cuda.runtime.hostAllocPortable)
        self.__array_interface__ = {
            "version": 3,
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self._address, False),
        }

    def __del__(self) -> None:
        if not sys.is_finalizing():
            with suppress(cupy.cuda.runtime.CUDARuntimeError):  # after a kernel's fault, which its event has raised
                cupy.cuda.runtime.freeHost(self._address)


class Executable:
    """An executable CUDA graph."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __del__(self) -> None:
        """CUDA destroys a graph that still runs when it is done."""
        if not sys.is_finalizing():
            with suppress(cupy.cuda.runtime.CUDARuntimeError):
                cupy.cuda.runtime.graphExecDestroy(self.address)


class StreamEvent:
    """A CUDA event. Its methods raise CUDARuntimeError after a kernel's fault."""

    def __init__(self, event: Any) -> None:
        self._event = event

    def is_done(self) -> bool:
        """CuPy's `Event.done` is False after a fault too, so the status of the query is read here."""
        status = cupy.cuda.runtime.eventQuery(self._event.ptr)
        if status == NOT_READY:
            return False
        cupy.cuda.runtime.check_status(status)
        return True

    def synchronize(self) -> None:
        self._event.synchronize()


def bus_id(ordinal: int) -> str:
    """PCI address of a device."""
    address: str = cupy.cuda.Device(ordinal).pci_bus_id
    return address


def count_devices() -> int:
    """Number of GPUs of this node visible to the process; 0 without a driver."""
    try:
        return int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError:
        return 0


def describe() -> list[str]:
    """One line for the driver and one per GPU: name, compute capability, memory, GPUs whose memory it can access."""
    runtime = cupy.cuda.runtime
    version = runtime.driverGetVersion()
    lines = [f"CUDA driver {version // 1000}.{version % 1000 // 10}, CuPy {cupy.__version__}"]
    for number in range(count_devices()):
        properties = runtime.getDeviceProperties(number)
        with cupy.cuda.Device(number) as device:
            free, total = (size / 2**30 for size in device.mem_info)
        accessible = [str(other) for other in range(count_devices()) if other != number and _can_access(number, other)]
        lines.append(
            f"GPU {number}: {properties['name'].decode()}, compute capability {properties['major']}."
            f"{properties['minor']}, {free:.1f} of {total:.1f} GiB free, reaches the memory of "
            + (", ".join(accessible) or "no other")
        )
    return lines


def _can_access(number: int, other: int) -> bool:
    return bool(cupy.cuda.runtime.deviceCanAccessPeer(number, other))
