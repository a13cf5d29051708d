"""`moempi bench generate`: tokens per second of whole runs and of transformers' generate, with equal weights and cores.

Transformers saves a small random Qwen3-MoE, which moempi converts; both generate greedy tokens alternately.
Transformers has as many threads as there are ranks, which sleep meanwhile.
"""

import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from moempi.bench import peers
from moempi.bench.jobs import WEIGHTS, make_job, step_seconds, write_prompts
from moempi.bench.measure import machine, ratio
from moempi.commands.flags import count
from moempi.config.job import Job
from moempi.errors import UsageError
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World
from moempi.storage.convert import convert
from moempi.storage.results import ResultFile

VOCABULARY = 512
POLL_S = 0.002


def add_flags(parser: ArgumentParser) -> None:
    """The batch, and how often."""
    parser.add_argument("--sequences", type=count, nargs="+", default=[1, 8, 32], metavar="B", help="batch (1 8 32)")
    parser.add_argument("--prompt", type=count, default=32, metavar="N", help="tokens of a prompt (32)")
    parser.add_argument("--tokens", type=count, default=32, metavar="N", help="tokens to generate (32)")
    parser.add_argument("--lanes", type=count, default=1, help="run.micro_batches; one machine has little to hide (1)")
    parser.add_argument("--rounds", type=count, default=3, help="measurements of each (3)")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective. Raises UsageError on several nodes or without transformers."""
    world.collectively(lambda: _check_usage(world))
    table = figures_table(
        *("precision", "batch", "moempi", "transformers", "ratio", "same tokens"),
        title=f"Tokens/s, {chosen.tokens} after prompts of {chosen.prompt}: {world.size} ranks, as many threads",
        caption=machine(world),
    )
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.comm.bcast(own))
        if world.rank == 0:
            peers.save_model(folder / "model", vocabulary=VOCABULARY)
            convert(folder / "model", folder / WEIGHTS)
        _sleep_until_all(world)
        for precision in ("float32", "bfloat16"):
            for sequences in chosen.sequences:
                table.add_row(precision, str(sequences), *_compare(world, folder, precision, sequences, chosen))
        world.comm.Barrier()
    if world.rank == 0:
        console().print(table)


def _check_usage(world: World) -> None:
    if world.num_nodes > 1:
        raise UsageError("bench generate compares cores of one node; start it on one")
    if not peers.has_transformers():
        raise UsageError("bench generate needs torch and transformers: bash jobs/setup.sh local convert peers")


def _compare(world: World, folder: Path, precision: str, sequences: int, chosen: Namespace) -> list[str]:
    """The cells of one batch: both rates, their ratio, and the share of equal tokens; collective."""
    prompts = np.random.default_rng(sequences).integers(0, VOCABULARY, (sequences, chosen.prompt))
    job = _job(folder, precision, sequences, chosen)
    theirs: dict[str, Callable[[], Any]] = {}
    if world.rank == 0:
        write_prompts(job.input.prompts, prompts.tolist())
        theirs = peers.generators(
            folder / "model", prompts, tokens=chosen.tokens, precision=precision, threads=world.size
        )
    taken: dict[str, list[float]] = {"moempi": [], **{name: [] for name in theirs}}
    for _ in range(chosen.rounds + 1):
        taken["moempi"].append(step_seconds(world, job)[0])
        for name, generate in theirs.items():
            begin = time.perf_counter()
            generated = generate()
            taken[name].append(time.perf_counter() - begin)
        _sleep_until_all(world)
    if world.rank:
        return []
    taken = {name: seconds[1:] for name, seconds in taken.items()}  # the first warms up
    best = min(theirs, key=lambda name: median(taken[name]))
    with ResultFile(job.output.results) as results:
        same = np.mean([record.tokens == row for record, row in zip(results.requests(), generated, strict=True)])
    rates = (sequences * chosen.tokens / median(taken[name]) for name in ("moempi", best))
    return [*(f"{rate:,.0f}" for rate in rates), f"{ratio(taken[best], taken['moempi']):.2f}", f"{same:.1%}"]


def _job(folder: Path, precision: str, sequences: int, chosen: Namespace) -> Job:
    run = {
        "backend": "numpy",
        "precision": precision,
        "threads": 1,
        "max_sequences": max(sequences, chosen.lanes),
        "micro_batches": chosen.lanes,
    }
    sampling = {"max_tokens": chosen.tokens, "ignore_eos": True}
    return make_job(folder, origin="bench generate", run=run, sampling=sampling)


def _sleep_until_all(world: World) -> None:
    """A barrier in which waiting ranks leave their cores to the others."""
    request = world.comm.Ibarrier()
    while not request.Test():
        time.sleep(POLL_S)
