"""Which backend a run uses, and how many GPUs there are for it."""

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
    """The backend that the job names; "auto" is a GPU where there is one.

    Rank i of a node uses GPU i modulo their number. `takes_device_memory` is called on a GPU only: whether rows may
    travel from its memory. The backend calls `progress` between the pieces of verbs that keep the host long. Raises
    ConfigError when the job asks for a GPU and there is none.
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
    """The GPUs of this node that CuPy finds, and where it finds none, why."""
    if find_spec("cupy") is None:
        return 0, "CuPy is not installed"
    try:
        from moempi.backend.cuda.cupy_device import count_devices
    except ImportError as error:
        return 0, f"CuPy does not load: {str(error).splitlines()[0]}"
    count = count_devices()
    return count, "" if count else "CuPy finds no CUDA device"


def find_island(local_rank: int, *, on_gpu: bool) -> str:
    """What this rank is near to inside its node (see island.py), as the backend's memory has it; "" when unknown.

    `on_gpu` without a GPU counts as on none.
    """
    gpus = find_gpus()[0] if on_gpu else 0
    if not gpus:
        return cpu_island()
    from moempi.backend.cuda.cupy_device import bus_id

    return gpu_island(bus_id(local_rank % gpus))


def describe_gpus() -> list[str]:
    """Lines about this node's GPUs for a person; one that says why when there is none."""
    _, problem = find_gpus()
    if problem:
        return [f"no GPU is used: {problem}"]
    from moempi.backend.cuda.cupy_device import describe

    return describe()
