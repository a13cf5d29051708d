import pytest

from simt.device import SimtDevice


@pytest.fixture(params=["forwards", "backwards"])
def device(request, monkeypatch):
    """The kernels' threads on the CPU, from the first to the last or the other way."""
    if request.param == "backwards":
        monkeypatch.setenv("SIMT_REVERSE", "1")
    return SimtDevice()
