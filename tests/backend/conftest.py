import os
from functools import cache

import pytest

from simt.simulated import NAMES, simulated

ON_GPU = os.environ.get("MOEMPI_TEST_DEVICE") == "cuda"


@pytest.fixture(params=["host buffers", "device buffers"] if ON_GPU else NAMES)
def device(request, monkeypatch):
    """A GPU, or the SIMT device: threads of a block in ascending or descending order, or CuPy's arrays."""
    return make_device(request.param, monkeypatch, captures=False)


@pytest.fixture(params=["host buffers", "device buffers"] if ON_GPU else NAMES)
def capturing_device(request, monkeypatch):
    """As `device`; a GPU whose products can be captured."""
    return make_device(request.param, monkeypatch, captures=True)


def make_device(param, monkeypatch, *, captures):
    if ON_GPU:
        return gpu(pinned=param == "host buffers", captures=captures)
    return simulated(param, monkeypatch, pinned=param != "cupy arrays")


def gpu(*, pinned, captures):
    """The GPU, whose stream and cuBLAS handle all tests share."""
    device = make_gpu(pinned, captures)
    device.use_queue(0)  # the last device that a test used has set CuPy's current stream
    return device


@cache
def make_gpu(pinned, captures):
    from moempi.backend.cuda.cupy_device import CupyDevice

    return CupyDevice(0, pinned=pinned, captures=captures)
