"""Selects the backend of a run, and finds the GPUs of the node."""

import ctypes
import logging
import shutil
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.heap import keep_freed_memory
from moempi.backend.cpu.kernels import load_kernels
from moempi.backend.locality import cpu_island, gpu_island
from moempi.backend.protocol import Backend
from moempi.config.job import RunSection
from moempi.errors import ConfigError

log = logging.getLogger(__name__)


def make_backend(
    run: RunSection,
    *,
    local_rank: int,
    device_buffers: bool,
    threads: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Backend:
    """Make the backend that the job names; "auto" uses a GPU if there is one, and warns if one seems to be unused.

    Rank i of a node uses GPU i modulo the number of GPUs. With a GPU, comm buffers are in device memory if
    `device_buffers`, which must be the same on all ranks, else in host memory. On a CPU, `threads` threads compute, and
    products are fast if the run asks for it and the processor has tiles. The backend calls `progress` while a verb
    computes or waits for long. Raises ConfigError if the job requires a GPU and there is none.
    """
    gpus = count_gpus(run)
    if not gpus:
        if run.backend == "auto" and local_rank == 0 and _seems_to_have_gpu():
            log.warning("this node seems to have a GPU, but the CPU is used: %s", find_gpus()[1])
        return _cpu_backend(run, threads=threads, progress=progress)
    from moempi.backend.cuda.backend import CudaBackend
    from moempi.backend.cuda.cupy_device import CupyDevice

    device = CupyDevice(local_rank % gpus, pinned=not device_buffers, captures=run.capture)
    log.info("backend cupy on %s", device.name)
    return CudaBackend(
        device,
        precision=run.precision,
        reproducible=run.reproducible,
        capture=run.capture,
        progress=progress,
    )


def _cpu_backend(run: RunSection, *, threads: int, progress: Callable[[], None]) -> NumpyBackend:
    """The compiled kernels if they work here, else NumPy; both need no other rank."""
    keep_freed_memory()
    kernels = load_kernels()
    if kernels is None:
        return NumpyBackend(precision=run.precision, progress=progress)
    tiled = _request_tiles(run)
    return CompiledBackend(kernels, precision=run.precision, threads=threads, tiled=tiled, progress=progress)


def has_fast_products(run: RunSection) -> bool:
    """Whether this rank computes fast products for a run that wants them; all ranks of a run must use the same."""
    return not count_gpus(run) and _request_tiles(run)


def _request_tiles(run: RunSection) -> bool:
    """Ask for the tiles of this CPU, if the run wants fast products; whether it has some."""
    kernels = load_kernels() if run.products == "fast" and run.precision == "bfloat16" else None
    return kernels is not None and kernels.request_tiles()


def count_gpus(run: RunSection) -> int:
    """The number of GPUs of this node that the run can use; raises ConfigError if there is none and it requires one."""
    gpus, problem = (0, "") if run.backend == "numpy" else find_gpus()
    if run.backend == "cupy" and problem:
        raise ConfigError(f'run.backend = "cupy": {problem}; use "auto" or "numpy"')
    return gpus


def find_gpus() -> tuple[int, str]:
    """The number of GPUs that CuPy finds on this node, and the reason if it is 0."""
    if find_spec("cupy") is None:
        return 0, "CuPy is not installed"
    if not _has_driver():
        return 0, "there is no CUDA driver (libcuda.so.1)"  # before CuPy is imported, into the memory of every rank
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


@cache
def _has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _seems_to_have_gpu() -> bool:
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def describe_gpus() -> list[str]:
    """One line per GPU of this node for the user, or one line with the reason if none is used."""
    _, problem = find_gpus()
    if problem:
        return [f"no GPU is used: {problem}"]
    from moempi.backend.cuda.cupy_device import describe

    return describe()
