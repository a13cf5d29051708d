"""The calls to CUDA whose meaning a machine without a GPU can check, with a driver that returns what the test says.

On a GPU, a real fault as well.
"""

import os
import subprocess
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

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
