"""The calls to CUDA whose meaning a machine without a GPU can check, with a driver that returns what the test says.

On a GPU, a real fault as well.
"""

import ctypes
import os
import re
import struct
import subprocess
import sys
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
    gpu = object.__new__(device.CupyDevice)
    gpu._queues = {}
    for number in (0, 1, 0):
        gpu.use_queue(number)
    assert made == [{"non_blocking": True, "priority": -1}] * 2


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
