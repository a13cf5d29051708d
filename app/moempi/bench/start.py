"""`moempi bench start`: how the start, the first steps, the end and the memory of a run grow with its ranks.

A random model, so small that its arithmetic takes little of the time, runs on the first 1, 2, 4 ... of the ranks. The
other ranks sleep.
"""

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from moempi.bench.jobs import WEIGHTS, make_job, silently_run, write_prompts
from moempi.bench.measure import machine
from moempi.commands.flags import count
from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.job import Job
from moempi.observe.console import console, figures_table
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.initialize import initialize

MODEL = Architecture(
    family="random",
    vocab_size=64,
    width=16,
    num_layers=2,
    max_positions=64,
    attention=AttentionShape(num_heads=2, num_kv_heads=2, head_dim=8),
    experts=Experts(num=256, width=8, router=Router(top_k=2)),
)
POLL_S = 0.02


class RunParts(NamedTuple):
    """Seconds of a run on its slowest rank until its first step, of its steps, and until its end; memory of a rank.

    `memory_mb` is the most private memory of a rank at the end.
    """

    start_s: float
    steps_s: float
    end_s: float
    memory_mb: float


class TimedWorld(World):
    """A world that notes when its rank passes the first point of a step."""

    first_step_at = 0.0

    def alive(self, where: str) -> None:
        """Record the point."""
        if not self.first_step_at and ", lane " in where:
            self.first_step_at = time.perf_counter()
        super().alive(where)


class TimedStop(Stop):
    """A stop that notes when all steps are done."""

    steps_done_at = 0.0

    def end_of_steps(self) -> None:
        """All steps are done."""
        self.steps_done_at = time.perf_counter()
        super().end_of_steps()


def add_flags(parser: ArgumentParser) -> None:
    """Repetitions."""
    parser.add_argument("--rounds", type=count, default=3, help="runs for each number of ranks; the fastest counts")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective, blocks."""
    sizes = [2**power for power in range(world.size.bit_length()) if 2**power <= world.size]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(world.comm.bcast(made))
        if world.rank == 0:
            initialize(MODEL, folder / WEIGHTS, seed=1)
            write_prompts(folder / "prompts.jsonl", [[1, 2, 3]] * 2 * world.size)
        measured = [fastest(world, folder, size=size, rounds=chosen.rounds) for size in sizes]
        world.comm.Barrier()
    if world.rank == 0:
        console().print(machine(world), growth_table(sizes, measured))


def fastest(world: World, folder: Path, *, size: int, rounds: int) -> RunParts:
    """The least of each part over the rounds, each on the slowest of the first `size` ranks; collective, blocks."""
    rows = [list(_measure(world, folder, size=size)) for _ in range(rounds)]
    return RunParts(*np.min(rows, axis=0).tolist())


def growth_table(sizes: Sequence[int], measured: Sequence[RunParts]) -> Table:
    """A row for each number of ranks, and one with the exponents of growth."""
    table = figures_table("ranks", "start s", "steps s", "end s", "MB of a rank")
    for size, parts in zip(sizes, measured, strict=True):
        seconds = (f"{part:.3f}" for part in parts[:3])
        table.add_row(str(size), *seconds, f"{parts.memory_mb:.1f}")
    exponents = (f"{exponent(sizes, column):.2f}" for column in zip(*measured, strict=True))
    table.add_row("exponent", *exponents)
    table.caption = (
        "the exponent of growth with the ranks; on cores that all ranks share 1 is constant work of a rank, 2 is linear"
    )
    return table


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The e of the best fit of values (n,) by c * sizes**e in logarithms; NaN for a single size."""
    if len(sizes) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-6)), 1)[0])


def _measure(world: World, folder: Path, *, size: int) -> RunParts:
    own: Any = world.comm.Split(int(world.rank >= size), world.rank)
    parts = RunParts(0.0, 0.0, 0.0, 0.0)
    if world.rank < size:
        begin, timed, stop = time.perf_counter(), TimedWorld(own), TimedStop()
        silently_run(timed, _job(folder, size), stop=stop)
        end, first = time.perf_counter(), timed.first_step_at
        if not (first and stop.steps_done_at):
            raise RuntimeError(f"the run on {size} ranks ended before its steps were done")
        parts = RunParts(first - begin, stop.steps_done_at - first, end - stop.steps_done_at, _private_mb())
    done = world.comm.Ibarrier()
    while not done.Test():  # a blocking call would take time from the ranks that run
        time.sleep(POLL_S)
    slowest = np.max(world.comm.allgather(list(parts)), axis=0)
    own.Free()
    return RunParts(*slowest.tolist())


def _job(folder: Path, size: int) -> Job:
    return make_job(
        folder,
        origin="bench start",
        run={"max_sequences": 4, "batch_tokens": 16, "kv_memory": "64KiB"},
        sampling={"max_tokens": 2},
        parallel={"stages": min(size, MODEL.num_layers)},
    )


def _private_mb() -> float:
    """Private memory of this process in MB; 0 where the system does not say."""
    path = Path("/proc/self/smaps_rollup")
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6
