import os

import pytest

from simt.device import SimtDevice

ON_GPU = os.environ.get("MOEMPI_TEST_DEVICE") == "cuda"


@pytest.fixture(params=["GPU"] if ON_GPU else ["forwards", "backwards"])
def device(request, monkeypatch):
    """A GPU, or the SIMT device with the threads of a block in ascending or descending order."""
    if ON_GPU:
        from moempi.backend.cuda.cupy_device import CupyDevice

        return CupyDevice(0, pinned=True)
    if request.param == "backwards":
        monkeypatch.setenv("SIMT_REVERSE", "1")
    return SimtDevice()
