"""The simulated devices by name: threads of a block in ascending or descending order, and CuPy's arrays."""

from importlib.util import find_spec
from typing import Any

import pytest

from simt.device import SimtDevice

NAMES = ["forwards", "backwards", "cupy arrays"] if find_spec("cupy") else ["forwards", "backwards"]


def simulated(name: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> SimtDevice:
    """A device with these options of SimtDevice."""
    if name == "cupy arrays":
        from simt.cupy_arrays import CupyArrayDevice

        return CupyArrayDevice(**options)
    if name == "backwards":
        monkeypatch.setenv("SIMT_REVERSE", "1")
    return SimtDevice(**options)
