"""The calls to CUDA whose meaning a machine without a GPU can check, with a driver that returns what the test says.

On a GPU, a real fault as well.
"""

import ctypes
import os
import re
import struct
import subprocess
import sys
import weakref
from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from moempi.backend.cuda.device import KERNELS, PREEMPTIBLE, find_kernel

cupy = pytest.importorskip("cupy")
NAME = "moempi.backend.cuda.cupy_device"


@pytest.fixture
def device(monkeypatch):
    """The module, also where cuBLAS is not installed: no product is computed here."""
    try:
        return import_module(NAME)
    except ImportError:
        monkeypatch.setitem(vars(import_module("cupy_backends.cuda.libs")), "cublas", ModuleType("cublas"))
        module = import_module(NAME)
        monkeypatch.delitem(sys.modules, NAME)
        return module


def return_statuses(monkeypatch, name, statuses):
    remaining = iter(statuses)
    monkeypatch.setattr(cupy.cuda.runtime, name, lambda *_: next(remaining))


def test_an_event_after_a_fault_raises_and_is_not_pending_for_ever(monkeypatch, device):
    event = device.StreamEvent(SimpleNamespace(ptr=1, done=False))
    return_statuses(monkeypatch, "eventQuery", [600, 0, 700, 719])
    assert not event.is_done()
    assert event.is_done()
    for _ in range(2):
        with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
            event.is_done()


def test_memory_is_registered_and_unregistered_unless_it_is_empty(monkeypatch, device):
    calls = []
    for name in ("hostRegister", "hostUnregister", "deviceSynchronize"):
        monkeypatch.setattr(cupy.cuda.runtime, name, lambda *given, name=name: calls.append((name, *given[:2])))
    for num_bytes in (0, 64):
        memory = np.zeros(num_bytes, np.uint8)
        device.CupyDevice.register_host_memory(None, memory)
        device.CupyDevice.unregister_host_memory(None, memory)
    address = memory.ctypes.data
    assert calls == [("hostRegister", address, 64), ("deviceSynchronize",), ("hostUnregister", address)]


def test_pinned_memory_is_freed_once_and_quietly_after_a_fault(monkeypatch, device):
    freed = []

    def free(address):
        freed.append(address)
        raise cupy.cuda.runtime.CUDARuntimeError(700)

    monkeypatch.setattr(cupy.cuda.runtime, "hostAlloc", lambda *_: 4096)
    monkeypatch.setattr(cupy.cuda.runtime, "freeHost", free)
    monkeypatch.setattr("sys.unraisablehook", lambda args: pytest.fail(str(args)))
    memory = device._PinnedMemory(8)
    del memory
    assert freed == [4096]
    monkeypatch.setattr("sys.is_finalizing", lambda: True)
    memory = device._PinnedMemory(8)
    del memory
    assert freed == [4096]


def launches_of(monkeypatch, kernel, **options):
    """The launches of a kernel: the attributes of cuLaunchKernelEx as (identifier, value), None if there are none."""
    module, seen = import_module("moempi.backend.cuda.compiled_kernel"), []

    def launch_with_attributes(config, *_):
        *_, address, number = struct.unpack("=7I4xQQI4x", config)
        held = ctypes.string_at(address, 72 * number)
        seen.append([struct.unpack_from("=i4xi", held, 72 * index) for index in range(number)])
        return 0

    function = SimpleNamespace(ptr=1)
    loaded = SimpleNamespace(load=lambda _: None, get_function=lambda _: function)
    monkeypatch.setattr(module, "Module", lambda: loaded)
    monkeypatch.setattr(module, "compiled", lambda *_: b"")
    monkeypatch.setattr(module, "_launch_kernel_ex", lambda: launch_with_attributes)
    monkeypatch.setattr(module.driver, "launchKernel", lambda *_: seen.append(None))
    compiled = module.CompiledKernel(kernel, architecture="sm_90", shared_bytes=0)
    compiled((1, 1, 1), 32, 5, [0] * len(kernel.parameters), **options)
    return seen


def test_long_kernels_alone_are_launched_with_the_least_priority(monkeypatch):
    """cuda.h: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION is 6, CU_LAUNCH_ATTRIBUTE_PRIORITY is 8."""
    latent = (("HEAD_DIM", 576), ("VALUE_DIM", 512), ("HEADS", 4))
    for file, name, constants in (
        ("attention.cu", "attend_rows", latent),
        ("attention_tiles.cu", "attend_tiles", (("HEAD_DIM", 128), ("VALUE_DIM", 128))),
        ("attention_warpgroups.cu", "attend_tiles", (("HEAD_DIM", 128), ("VALUE_DIM", 128))),
        ("selection.cu", "index_scores", ()),
        ("selection.cu", "choose_positions", ()),
        ("selection.cu", "take_positions", ()),
        ("delta_rule.cu", "delta_rule", ()),
        ("delta_rule.cu", "state_space", ()),
    ):
        assert launches_of(monkeypatch, find_kernel(file, name, constants)) == [[(8, 0)]]
    for file, name in (("norm.cu", "rms_norm"), ("delta_rule.cu", "causal_conv"), ("packing.cu", "take_rows")):
        assert launches_of(monkeypatch, find_kernel(file, name)) == [None]
    assert launches_of(monkeypatch, find_kernel("norm.cu", "rms_norm"), early=True) == [[(6, 1)]]


def test_every_long_kernel_is_one_of_a_file():
    defined = set(re.findall(r"__global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", all_kernels()))
    assert defined >= PREEMPTIBLE


def all_kernels():
    return "".join(path.read_text() for path in KERNELS.glob("*.cu"))


def test_queues_have_a_priority_above_that_of_long_kernels(monkeypatch, device):
    made = []

    def make_stream(**options):
        made.append(options)
        return SimpleNamespace(ptr=7, use=lambda: None)

    monkeypatch.setattr(device.cupy.cuda, "Stream", make_stream)
    monkeypatch.setattr(device.cublas, "create", lambda: 1, raising=False)
    monkeypatch.setattr(device.cublas, "setStream", lambda *_: None, raising=False)
    gpu = unopened(device)
    for number in (0, 1, 0):
        gpu.use_queue(number)
    assert made == [{"non_blocking": True, "priority": -1}] * 2


def unopened(device, **attributes):
    """A device whose GPU is not opened."""
    gpu = object.__new__(device.CupyDevice)
    vars(gpu).update({"_queues": {}, "_captures": False, "_used": None, "_stream": SimpleNamespace(ptr=7)} | attributes)
    return gpu


class FakeArray:
    """An array whose copies do nothing."""

    nbytes = 8

    def __init__(self):
        self.data = SimpleNamespace(copy_from_device_async=lambda *_: None)


@pytest.fixture
def graph_calls(monkeypatch, device):
    """The calls that capture, instantiate (11 -> 33), launch and destroy graphs."""
    calls, results = [], {"streamEndCapture": 11}
    for name in ("streamBeginCapture", "streamEndCapture", "graphDestroy", "graphLaunch", "graphExecDestroy"):

        def call(*given, name=name):
            calls.append((name, *given))
            return results.get(name)

        monkeypatch.setattr(cupy.cuda.runtime, name, call)
    monkeypatch.setattr(device, "instantiate_graph", lambda graph: calls.append(("instantiate", graph)) or 33)
    return calls


def test_work_is_captured_into_an_executable_graph_that_keeps_its_arrays(device, graph_calls):
    """cudaStreamCaptureModeRelaxed is 2: no call that Python makes meanwhile, as a free, may end the capture."""
    gpu, arrays = unopened(device), [FakeArray(), FakeArray()]
    alive = [weakref.ref(array) for array in arrays]
    graph = gpu.capture(lambda: gpu.copy(*arrays))
    captured = [("streamBeginCapture", 7, 2), ("streamEndCapture", 7), ("instantiate", 11), ("graphDestroy", 11)]
    assert graph_calls == captured
    del arrays[:]
    assert all(array() is not None for array in alive)
    gpu._stream = SimpleNamespace(ptr=9)
    gpu.launch_graph(graph)
    del graph
    assert graph_calls[len(captured) :] == [("graphLaunch", 33, 9), ("graphExecDestroy", 33)]
    assert all(array() is None for array in alive)
    gpu.copy(FakeArray(), FakeArray())  # keeps nothing
    assert gpu._used is None


def test_an_error_under_capture_ends_it(monkeypatch, device, graph_calls):
    gpu = unopened(device)
    with pytest.raises(RuntimeError, match="the work of another queue cannot be captured"):
        gpu.capture(lambda: gpu.use_queue(1))
    assert graph_calls == [("streamBeginCapture", 7, 2), ("streamEndCapture", 7), ("graphDestroy", 11)]

    def refuse(_):
        raise cupy.cuda.runtime.CUDARuntimeError(901)

    monkeypatch.setattr(cupy.cuda.runtime, "streamEndCapture", refuse)
    with pytest.raises(ZeroDivisionError):
        gpu.capture(lambda: 1 // 0)
    assert gpu._used is None


def test_a_capture_that_cuda_does_not_begin_leaves_the_device_as_it_was(monkeypatch, device, graph_calls):
    def refuse(*_):
        raise cupy.cuda.runtime.CUDARuntimeError(900)

    monkeypatch.setattr(cupy.cuda.runtime, "streamBeginCapture", refuse)
    gpu = unopened(device)
    gpu._queues[1] = SimpleNamespace(ptr=9, use=lambda: None), 1
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError):
        gpu.capture(lambda: None)
    gpu.use_queue(1)
    assert gpu.queue == 1
    assert not graph_calls


def test_kernels_of_a_graph_keep_their_priorities(monkeypatch):
    """cuda.h: CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY is 8."""
    module, seen = import_module("moempi.backend.cuda.compiled_kernel"), []

    def instantiate(executable, graph, flags):
        seen.append((graph.value, flags.value))
        executable._obj.value = 1 << 40
        return 0

    monkeypatch.setattr(module, "_driver", lambda: SimpleNamespace(cuGraphInstantiateWithFlags=instantiate))
    assert module.instantiate_graph(1 << 41) == 1 << 40
    assert seen == [(1 << 41, 8)]


LIBRARY = r"""
#include <stdio.h>
char seen[512];
int status;
typedef const void* P;
typedef long long L;
int cublasGemmEx(void* handle, int a, int b, int m, int n, int k, P alpha, P A, int at, int lda, P B, int bt, int ldb,
                 P beta, void* C, int ct, int ldc, int compute, int algorithm) {
  snprintf(seen, sizeof seen, "%zu %d %d %d %d %d %zu %zu %d %d %zu %d %d %zu %zu %d %d %d %d", (size_t)handle, a, b,
           m, n, k, (size_t)alpha, (size_t)A, at, lda, (size_t)B, bt, ldb, (size_t)beta, (size_t)C, ct, ldc, compute,
           algorithm);
  return status;
}
int cublasGemmStridedBatchedEx(void* handle, int a, int b, int m, int n, int k, P alpha, P A, int at, int lda, L sa,
                               P B, int bt, int ldb, L sb, P beta, void* C, int ct, int ldc, L sc, int count,
                               int compute, int algorithm) {
  snprintf(seen, sizeof seen, "%zu %d %d %d %d %d %zu %zu %d %d %lld %zu %d %d %lld %zu %zu %d %d %lld %d %d %d",
           (size_t)handle, a, b, m, n, k, (size_t)alpha, (size_t)A, at, lda, sa, (size_t)B, bt, ldb, sb, (size_t)beta,
           (size_t)C, ct, ldc, sc, count, compute, algorithm);
  return status;
}
int cublasSetWorkspace_v2(void* handle, void* workspace, size_t size) {
  snprintf(seen, sizeof seen, "%zu %zu %zu", (size_t)handle, (size_t)workspace, size);
  return status;
}
"""
"""The functions of cublas_api.h that are called, which say what they were given."""


@pytest.fixture
def library(monkeypatch, device, tmp_path):
    """`LIBRARY` in the place of cuBLAS."""
    path = tmp_path / "library.so"
    subprocess.run(["cc", "-x", "c", "-shared", "-fPIC", "-o", path, "-"], input=LIBRARY, text=True, check=True)
    monkeypatch.setattr(device.cublas, "__file__", str(path), raising=False)
    monkeypatch.setattr(device.cublas, "check_status", lambda status: None, raising=False)
    own = device.cublas_calls
    own.functions.cache_clear(), own._function.cache_clear()
    yield ctypes.CDLL(str(path))
    own.functions.cache_clear(), own._function.cache_clear()


def test_own_calls_of_cublas_have_the_arguments_of_cupy_s(device, library):
    """CuPy's `gemmEx` and `gemmStridedBatchedEx` take the arguments of the C functions."""
    from simt.cupy_arrays import CupyArrayDevice

    memory, given, seen = CupyArrayDevice(), [], (ctypes.c_char * 512).in_dll(library, "seen")
    record = SimpleNamespace(gemmEx=lambda *a: given.append(a), gemmStridedBatchedEx=lambda *a: given.append(a))
    own = device.cublas_calls.functions()
    x, matrix, out = (memory.empty(shape, np.uint16) for shape in ((5, 24), (12, 16), (5, 12)))
    wide = memory.empty((5, 16), np.float32)
    heads, matrices, outputs = (memory.empty(shape, np.uint16) for shape in ((5, 3, 8), (3, 8, 4), (5, 3, 4)))
    for submit in (
        lambda gpu: gpu.product(x[:, 4:20], matrix, out, transposed=False),
        lambda gpu: gpu.product(x[:, :12], matrix, wide, transposed=True),
        lambda gpu: gpu.products(heads, matrices, outputs),
    ):
        submit(unopened(device, _library=own, _handle=1 << 40))
        called = [int(number) for number in seen.value.split()]
        submit(unopened(device, _library=record, _handle=1 << 40))
        assert called == list(given[-1])


def test_a_handle_of_a_device_that_captures_gets_a_workspace_behind_its_stream(monkeypatch, device, library):
    """cublasSetStream drops the workspace."""
    calls, seen = [], (ctypes.c_char * 512).in_dll(library, "seen")
    workspace, stream = FakeArray(), SimpleNamespace(ptr=7, use=lambda: None)
    workspace.data.ptr = 1 << 40
    monkeypatch.setattr(device.cupy.cuda, "Stream", lambda **_: stream)
    monkeypatch.setattr(device.cublas, "create", lambda: 1, raising=False)
    monkeypatch.setattr(device.cublas, "setStream", lambda *given: calls.append(given), raising=False)
    gpu = unopened(device, _captures=True, _workspaces=[])
    gpu.allocate_shared = lambda shape, _: calls.append(shape) or workspace
    gpu.use_queue(0)
    assert calls == [(1, 7), (32 << 20,)]
    assert seen.value.split() == [b"1", b"%d" % (1 << 40), b"8"]
    assert gpu._workspaces == [workspace]
    gpu.use_queue(-1)  # of copies, without products
    assert calls[2:] == [(1, 7)]


def test_an_error_of_cublas_is_raised(monkeypatch, device, library):
    statuses = []
    monkeypatch.setattr(device.cublas, "check_status", statuses.append)
    ctypes.c_int.in_dll(library, "status").value = 7
    device.cublas_calls.functions().gemmEx(*[0] * 19)
    assert statuses == [7]


@pytest.mark.skipif(os.environ.get("MOEMPI_TEST_DEVICE") != "cuda", reason="needs a GPU")
def test_a_real_fault_is_an_error_at_once():
    """In a process of its own, because a fault ends the process's use of the GPU."""
    code = (
        "import numpy as np; from moempi.backend.cuda.backend import CudaBackend\n"
        "from moempi.backend.cuda.cupy_device import CupyDevice\n"
        "backend = CudaBackend(CupyDevice(0, pinned=True), precision='bfloat16', reproducible=False)\n"
        "rows = backend.tensor(np.zeros((8, 64), np.uint16)); print(backend.download(rows).sum())\n"
        "backend.download(backend.take_rows(rows, np.array([1 << 30])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "0\n"
    assert done.returncode == 1
    assert "cudaErrorIllegalAddress" in done.stderr


@pytest.mark.skipif(os.environ.get("MOEMPI_TEST_DEVICE") != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("shape", [(64,), (3 << 20,)], ids=["small", "large"])
def test_copies_do_not_change_the_current_stream(device, shape):
    """CuPy's own calls with a stream can leave the null stream as the current one, on which it uploads."""
    gpu = device.CupyDevice(0, pinned=True)
    gpu.use_queue(1)
    values = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    resident, copied = gpu.upload(values), gpu.empty(shape, np.int64)
    gpu.copy(resident, copied)
    np.testing.assert_array_equal(gpu.download(copied), values)
    np.testing.assert_array_equal(gpu.download(copied[::2]), values[::2])
    assert cupy.cuda.get_current_stream().ptr == gpu._stream.ptr
