"""Which backend a run uses, and how many GPUs there are for it."""

import logging
from collections.abc import Callable
from importlib.util import find_spec

from moempi.backend.cupy_backend import CupyBackend
from moempi.backend.numpy_backend import NumpyBackend
from moempi.backend.protocol import Backend
from moempi.config.job import RunSection
from moempi.errors import ConfigError


def make_backend(run: RunSection, *, local_rank: int, takes_device_memory: Callable[[], bool]) -> Backend:
    """The backend that the job names; "auto" is a GPU where there is one.

    Rank i of a node uses GPU i modulo their number. `takes_device_memory` is asked, on a GPU only, whether rows may
    travel from its own memory. Raises ConfigError when the job asks for a GPU and there is none.
    """
    gpus = 0 if run.backend == "numpy" else count_gpus()
    if run.backend == "cupy" and not gpus:
        missing = "no CUDA device is visible" if find_spec("cupy") else 'CuPy is not installed ("moempi[cuda]")'
        raise ConfigError(f'run.backend = "cupy": {missing}; use "auto" or "numpy"')
    if not gpus:
        return NumpyBackend(precision=run.precision, reproducible=run.reproducible)
    from moempi.backend.cupy_device import CupyDevice

    device = CupyDevice(local_rank % gpus, pinned=not takes_device_memory())
    logging.getLogger(__name__).info("backend cupy on %s", device.name)
    return CupyBackend(device, precision=run.precision, reproducible=run.reproducible)


def count_gpus() -> int:
    """GPUs of this node that CuPy finds; 0 without CuPy or driver."""
    if find_spec("cupy") is None:
        return 0
    from moempi.backend.cupy_device import count_devices

    return count_devices()


def describe_gpus() -> list[str]:
    """Lines about this node's GPUs for a person; one that says why when there is none."""
    if find_spec("cupy") is None:
        return ["no GPU is used: CuPy is not installed"]
    from moempi.backend.cupy_device import describe

    return describe() if count_gpus() else ["no GPU is used: CuPy finds no CUDA device"]
