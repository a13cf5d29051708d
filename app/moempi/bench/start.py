"""`moempi bench start`: what the parts of a run and the memory of its ranks take, and how they grow with the ranks.

A run without arithmetic on the first 1, 2, 4 ... of the ranks, in stages of a few ranks: more ranks are more stages.
The other ranks sleep. What is fitted is processor time: ranks share the cores, and a rank that waits sleeps.
"""

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moempi.arrays import Float64Array
from moempi.bench.jobs import WEIGHTS, make_job, silently_run, write_prompts
from moempi.bench.measure import machine
from moempi.bench.zeros import without_arithmetic
from moempi.commands.flags import count
from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.job import Job
from moempi.engine import phases
from moempi.fitting import fit_growth
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.initialize import initialize

PARTS = {
    "connect": "",
    "inputs": phases.INPUTS,
    "layout": phases.LAYOUT,
    "loading": phases.LOADING,
    "lanes": phases.LANES,
    "steps": ", lane ",
    "records": phases.RECORDS,
    "results": phases.RESULTS,
}
"""The parts of a run, each with the name, or a part of it, that `World.alive` gets at its first point."""
MANY = 3904
"""The ranks that the figures are extrapolated to: 61 stages of 64."""
NUM_PROMPTS = 16
POLL_S = 0.1


class Measured(NamedTuple):
    """What a run on some ranks took: milliseconds of a core of a rank in each part (P,), and of the slowest rank's.

    `cpu_ms` are means over the ranks, `most_cpu_ms` of the rank that took most, `wall_s` seconds of the slowest rank;
    `memory_mb` is the private memory of a rank at the end, the mean over those that ran for the first time.
    """

    cpu_ms: Float64Array
    most_cpu_ms: Float64Array
    wall_s: Float64Array
    memory_mb: float


class TimedWorld(World):
    """A world that counts the seconds of each part of a run (P, 2): of a core, and on the clock."""

    def __init__(self, comm: Any) -> None:
        self.seconds = np.zeros((len(PARTS), 2))
        self.num_parts, self._since = 0, _clocks()
        super().__init__(comm)

    def alive(self, where: str) -> None:
        """Record the point; the next part begins at its first point."""
        following = [*PARTS.values()][self.num_parts + 1 : self.num_parts + 2]
        if following and following[0] in where:
            self.end_part()
        super().alive(where)

    def end_part(self) -> None:
        """A part is over."""
        now = _clocks()
        self.seconds[self.num_parts] = now - self._since
        self.num_parts, self._since = self.num_parts + 1, now


def add_flags(parser: ArgumentParser) -> None:
    """Repetitions, and what is computed."""
    parser.add_argument("--rounds", type=count, default=1, help="runs for each number of ranks; the fastest counts")
    parser.add_argument("--stage-ranks", type=count, default=4, metavar="N", help="ranks of a stage")
    parser.add_argument("--compute", action="store_true", help="also compute: with the backend that a job would use")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective, blocks."""
    sizes = [2**power for power in range(world.size.bit_length()) if 2**power <= world.size]
    stages = [max(1, size // chosen.stage_ranks) for size in sizes]
    with tempfile.TemporaryDirectory() as made, nullcontext() if chosen.compute else without_arithmetic():
        folder = Path(world.comm.bcast(made))
        if world.rank == 0:
            initialize(model(stages[-1]), folder / WEIGHTS, seed=1)
            write_prompts(folder / "prompts.jsonl", [[1, 2, 3]] * NUM_PROMPTS)
        measured = [
            fastest([_measure(world, _job(folder, number), size=size) for _ in range(chosen.rounds)])
            for size, number in zip(sizes, stages, strict=True)
        ]
        world.comm.Barrier()
    if world.rank == 0:
        first = sum(size < chosen.stage_ranks for size in sizes)
        layers = [stages[-1] / number for number in stages]
        print_growth(sizes, layers, measured, first=min(first, len(sizes) - 1), header=machine(world))


def model(num_layers: int) -> Architecture:
    """A random model of `num_layers` layers."""
    return Architecture(
        family="random",
        vocab_size=64,
        width=16,
        num_layers=num_layers,
        max_positions=64,
        attention=AttentionShape(num_heads=2, num_kv_heads=2, head_dim=8),
        experts=Experts(num=8, width=8, router=Router(top_k=2)),
    )


def fastest(rounds: Sequence[Measured]) -> Measured:
    """The least of each figure over the rounds."""
    return Measured(*(np.min(figures, axis=0) for figures in zip(*rounds, strict=True)))


def print_growth(
    sizes: Sequence[int], layers: Sequence[float], measured: Sequence[Measured], *, first: int, header: str
) -> None:
    """Print tables of processor time and of seconds: a row for each part, a column for each number of ranks.

    layers[n] are a rank's at sizes[n]. What a part grows like is fitted from number `first` of the sizes on.
    """
    from moempi.observe.console import console, figures_table  # takes memory of the one rank that prints

    mean, most, wall, memory = zip(*measured, strict=True)
    tables = []
    for title, rows in (
        ("ms of a core, the mean of the ranks", _rows(mean) | {"MB": memory}),
        ("ms of a core, the rank that takes most", _rows(most)),
    ):
        table = figures_table("", *map(str, sizes), "grows", f"{MANY:,}", title=title)
        for name, row in rows.items():
            fit = fit_growth(sizes[first:], layers[first:], np.maximum(row[first:], 1e-6).tolist())
            table.add_row(name, *map(_short, row), fit.law, _short(fit.at(MANY, layers[-1])))
        tables.append(table)
    table = figures_table("", *map(str, sizes), title="seconds of the slowest rank, of cores that all ranks share")
    for name, row in _rows(wall).items():
        table.add_row(name, *(f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}" for seconds in row))
    table.caption = (
        f"fitted from {sizes[first]} ranks on: a constant, layers of a rank, and what it grows with; {MANY:,} ranks "
        "are an extrapolation; MB are private memory"
    )
    console().print(header, *tables, table)


def _rows(figures: Sequence[Float64Array]) -> dict[str, Sequence[float]]:
    """Figures (P,) of each number of ranks, by the name of the part, and their sums."""
    by_part = np.array(figures).T
    return dict(zip([*PARTS, "all"], [*by_part.tolist(), by_part.sum(axis=0).tolist()], strict=True))


def _short(figure: float) -> str:
    return f"{figure:.3g}" if figure < 100 else f"{figure:.0f}"


def _measure(world: World, job: Job, *, size: int) -> Measured:
    own = world.comm.Split(int(world.rank >= size), world.rank)
    seconds, memory_mb = np.zeros((len(PARTS), 2)), 0.0
    if world.rank < size:
        timed = TimedWorld(own)
        silently_run(timed, job, stop=Stop())
        timed.end_part()
        if timed.num_parts < len(PARTS):
            raise RuntimeError(f"the run on {size} ranks ended in part {timed.num_parts} of {len(PARTS)}")
        seconds, memory_mb = timed.seconds, private_mb()
    done = world.comm.Ibarrier()
    while not done.Test():  # a blocking call would take time from the ranks that run
        time.sleep(POLL_S)
    each, memory = np.array(world.comm.allgather(seconds))[:size], world.comm.allgather(memory_mb)[size // 2 : size]
    own.Free()
    cpu_ms = each[:, :, 0] * 1e3
    return Measured(cpu_ms.mean(axis=0), cpu_ms.max(axis=0), each[:, :, 1].max(axis=0), float(np.mean(memory)))


def _job(folder: Path, stages: int) -> Job:
    return make_job(
        folder,
        origin="bench start",
        run={"max_sequences": 4, "batch_tokens": 16, "kv_memory": "1MiB"},
        sampling={"max_tokens": 2},
        parallel={"stages": stages},
    )


def _clocks() -> Float64Array:
    return np.array([time.process_time(), time.perf_counter()])


def private_mb() -> float:
    """Private memory of this process in MB; 0 where the system does not say."""
    path = Path("/proc/self/smaps_rollup")
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / 1e6
