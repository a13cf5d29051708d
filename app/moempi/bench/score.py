"""`moempi bench score`: prompt tokens per second of scoring, beside transformers, with equal weights and cores.

Transformers saves a random Qwen3-MoE, which moempi converts; both compute the log-probability of every token of the
prompts, in turn. Transformers has the threads of all ranks, which sleep meanwhile.
"""

import tempfile
from argparse import ArgumentParser, Namespace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from moempi.bench import peers
from moempi.bench.jobs import make_job, step_seconds, write_prompts
from moempi.bench.measure import add_products_flag, check_products, machine, ratio, sleep_until_all, timed
from moempi.commands.flags import count
from moempi.config.job import Job
from moempi.errors import UsageError
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World
from moempi.storage.results import ResultFile


def add_flags(parser: ArgumentParser) -> None:
    """The prompts, and how often."""
    parser.add_argument("--prompts", type=count, default=8, metavar="B", help="number of prompts (8)")
    parser.add_argument("--tokens", type=count, nargs="+", default=[32, 512], metavar="N", help="of a prompt (32 512)")
    parser.add_argument("--threads", type=count, default=1, help="run.threads, of each rank (1)")
    parser.add_argument("--large", action="store_true", help="a model of 430 million parameters, not of 30")
    parser.add_argument("--rounds", type=count, default=3, help="measurements of each (3)")
    add_products_flag(parser)


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective.

    Raises UsageError on several nodes, without transformers, or for prompts of one token.
    """

    def check() -> None:
        peers.check_peers(world, benchmark="score")
        if min(chosen.tokens) < 2:
            raise UsageError("--tokens: of a prompt of one token nothing is scored; give 2 at least")

    world.collectively(check)
    check_products(world, chosen.products)
    table = figures_table(
        *("precision", "prompts", "tokens", "moempi", "peer", "its rate", "ratio", "largest difference"),
        title=f"Prompt tokens/s of scoring: {world.size} ranks of {chosen.threads} threads, {chosen.products} products",
        caption=machine(world),
    )
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.comm.bcast(own))
        peers.make_model(world, folder, large=chosen.large)
        for precision in ("float32", "bfloat16"):
            for tokens in chosen.tokens:
                cells = _compare(world, folder, precision, tokens, chosen)
                table.add_row(precision, str(chosen.prompts), str(tokens), *cells)
        world.comm.Barrier()
    if world.rank == 0:
        console().print(table)


def _compare(world: World, folder: Path, precision: str, tokens: int, chosen: Namespace) -> list[str]:
    """Both rates, their ratio, and the largest difference of a log-probability; nothing but on rank 0; collective."""
    prompts = np.random.default_rng(tokens).integers(0, peers.VOCABULARY, (chosen.prompts, tokens))
    job = _job(folder, precision, chosen)
    theirs = {}
    if world.rank == 0:
        write_prompts(job.input.prompts, prompts.tolist())
        theirs = peers.scorers(folder / "model", prompts, precision=precision, threads=world.size * chosen.threads)
    ours: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in theirs}
    scores: dict[str, Any] = {}
    for _ in range(chosen.rounds + 1):
        ours.append(step_seconds(world, job)[0])
        for name, score in theirs.items():
            seconds, scores[name] = timed(score)
            taken[name].append(seconds)
        sleep_until_all(world)
    if world.rank:
        return []
    ours, taken = ours[1:], {name: seconds[1:] for name, seconds in taken.items()}  # the first warms up
    fastest = min(taken, key=lambda name: median(taken[name]))
    with ResultFile(job.output.results) as results:
        own = np.array([record.score[1:] for record in results.requests()])
    rates = [f"{prompts.size / median(each):,.0f}" for each in (ours, taken[fastest])]
    difference = np.abs(own - scores[fastest]).max()
    return [rates[0], fastest, rates[1], f"{ratio(taken[fastest], ours):.2f}", f"{difference:.1e}"]


def _job(folder: Path, precision: str, chosen: Namespace) -> Job:
    run = {
        "backend": "numpy",
        "precision": precision,
        "products": chosen.products,
        "threads": chosen.threads,
        "max_sequences": chosen.prompts,
    }
    return make_job(folder, origin="bench score", task="score", run=run)
