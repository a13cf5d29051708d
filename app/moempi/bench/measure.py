"""Measuring: the contestants run alternately, so that a busy machine slows all of them, and medians are compared."""

import os
import platform
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any, Literal

import numpy as np

from moempi.backend.cpu.kernels import Kernels
from moempi.backend.select import has_fast_products
from moempi.config.job import RunSection
from moempi.errors import UsageError
from moempi.runtime.world import World

PACKAGES = ("moempi", "numpy", "mpi4py", "torch", "transformers")
POLL_S = 0.002
Contestants = Mapping[str, Callable[[], object]]


def alternate(world: World, contestants: Contestants, *, rounds: int) -> dict[str, list[float]]:
    """Run all contestants one after another, in one round to warm up and `rounds` that count; collective, blocks.

    The names are the same on all ranks; ranks that wait for others sleep. Returns the seconds of each counted run on
    its slowest rank.
    """
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            sleep_until_all(world)
            world.comm.Barrier()
            begin = perf_counter()
            run()
            taken[name].append(perf_counter() - begin)
    slowest = np.max(world.comm.allgather([seconds[1:] for seconds in taken.values()]), axis=0)
    return dict(zip(taken, slowest.tolist(), strict=True))


def add_products_flag(parser: ArgumentParser) -> None:
    """The flag of `run.products`."""
    parser.add_argument("--products", choices=("exact", "fast"), default="exact", help="run.products (exact)")


def check_products(world: World, products: Literal["exact", "fast"]) -> None:
    """Raises UsageError if products shall be fast and a processor has no tiles; collective."""

    def check() -> None:
        run = RunSection(backend="numpy", products=products)
        if products == "fast" and not has_fast_products(run):
            raise UsageError("--products fast: this processor has no tiles (AMX-BF16), or there is no C compiler")

    world.collectively(check)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of a call, and what it returns."""
    begin = perf_counter()
    result = run()
    return perf_counter() - begin, result


def sleep_until_all(world: World) -> None:
    """A barrier in which waiting ranks leave their cores to the others; collective, blocks."""
    request = world.comm.Ibarrier()
    while not request.Test():
        sleep(POLL_S)


def ratio(theirs: list[float], ours: list[float]) -> float:
    """The speedup of ours: the median over rounds of theirs / ours."""
    return median(their / our for their, our in zip(theirs, ours, strict=True))


@dataclass(slots=True)
class Clock:
    """Seconds spent in the timed functions."""

    seconds: float = 0.0


@contextmanager
def product_clock() -> Iterator[Clock]:
    """Inside the block, the clock counts the time of matrix products, of NumPy and of the kernels."""
    from unittest.mock import patch

    clock, matmul, kernels = Clock(), np.matmul, Kernels.multiply

    def timed(product: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arrays: Any, **options: Any) -> Any:
            begin = perf_counter()
            result = product(*arrays, **options)
            clock.seconds += perf_counter() - begin
            return result

        return run

    with (
        patch.object(np, "matmul", timed(matmul)),
        patch.object(Kernels, "multiply", timed(kernels)),
    ):
        yield clock


def machine(world: World) -> str:
    """Processor, ranks and versions of the packages, in one line."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"{_processor()}, {os.cpu_count()} cores, {world.size} ranks on {world.num_nodes} nodes, "
        f"OMP_NUM_THREADS={threads}, {blas['name']} {blas['version']}, Python {platform.python_version()}, "
        + ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    )


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
