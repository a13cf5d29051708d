"""Selects the backend of a run, and finds the GPUs of the node."""

import logging
from collections.abc import Callable
from importlib.util import find_spec

from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.locality import cpu_island, gpu_island
from moempi.backend.protocol import Backend
from moempi.config.job import RunSection
from moempi.errors import ConfigError


def make_backend(
    run: RunSection,
    *,
    local_rank: int,
    takes_device_memory: Callable[[], bool],
    progress: Callable[[], None] = lambda: None,
) -> Backend:
    """Make the backend that the job names; "auto" uses a GPU if there is one.

    Rank i of a node uses GPU i modulo the number of GPUs. `takes_device_memory()`, called only for a GPU, returns
    whether MPI can send from device memory. The backend calls `progress` between the pieces of long verbs. Raises
    ConfigError if the job requires a GPU and there is none.
    """
    gpus, problem = (0, "") if run.backend == "numpy" else find_gpus()
    if run.backend == "cupy" and problem:
        raise ConfigError(f'run.backend = "cupy": {problem}; use "auto" or "numpy"')
    if not gpus:
        return NumpyBackend(precision=run.precision, reproducible=run.reproducible, progress=progress)
    from moempi.backend.cuda.cupy_device import CupyDevice

    device = CupyDevice(local_rank % gpus, pinned=not takes_device_memory())
    logging.getLogger(__name__).info("backend cupy on %s", device.name)
    return CudaBackend(device, precision=run.precision, reproducible=run.reproducible)


def find_gpus() -> tuple[int, str]:
    """The number of GPUs that CuPy finds on this node, and the reason if it is 0."""
    if find_spec("cupy") is None:
        return 0, "CuPy is not installed"
    try:
        from moempi.backend.cuda.cupy_device import count_devices
    except ImportError as error:
        return 0, f"CuPy does not load: {str(error).splitlines()[0]}"
    count = count_devices()
    return count, "" if count else "CuPy finds no CUDA device"


def find_island(local_rank: int, *, on_gpu: bool) -> str:
    """The domain of this rank (see locality.py): NVLink if `on_gpu` and there is a GPU, else NUMA; "" if unknown."""
    gpus = find_gpus()[0] if on_gpu else 0
    if not gpus:
        return cpu_island()
    from moempi.backend.cuda.cupy_device import bus_id

    return gpu_island(bus_id(local_rank % gpus))


def describe_gpus() -> list[str]:
    """One line per GPU of this node for the user, or one line with the reason if none is used."""
    _, problem = find_gpus()
    if problem:
        return [f"no GPU is used: {problem}"]
    from moempi.backend.cuda.cupy_device import describe

    return describe()
