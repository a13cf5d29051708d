"""`moempi bench generate`: tokens per second of whole runs and of other programs, with equal weights and cores.

Transformers saves a random Qwen3-MoE, which moempi converts; all generate greedy tokens in turn. Transformers'
generate, and llama.cpp if its Python package is installed, have the threads of all ranks, which sleep meanwhile.
"""

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from moempi.bench import llama_cpp, peers
from moempi.bench.jobs import make_job, step_seconds, write_prompts
from moempi.bench.measure import add_products_flag, check_products, machine, ratio, sleep_until_all, timed
from moempi.commands.flags import count
from moempi.config.job import Job
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World
from moempi.storage.results import ResultFile

GGUF = "model.gguf"
LLAMA_CPP = "llama.cpp"


def add_flags(parser: ArgumentParser) -> None:
    """The batch, and how often."""
    parser.add_argument("--sequences", type=count, nargs="+", default=[1, 8, 32], metavar="B", help="batch (1 8 32)")
    parser.add_argument("--prompt", type=count, default=32, metavar="N", help="tokens of a prompt (32)")
    parser.add_argument("--tokens", type=count, default=32, metavar="N", help="tokens to generate (32)")
    parser.add_argument("--lanes", type=count, default=1, help="run.micro_batches; one machine has little to hide (1)")
    parser.add_argument("--threads", type=count, default=1, help="run.threads, of each rank (1)")
    parser.add_argument("--large", action="store_true", help="a model of 430 million parameters, not of 30")
    parser.add_argument("--rounds", type=count, default=3, help="measurements of each (3)")
    add_products_flag(parser)


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective. Raises UsageError on several nodes or without transformers."""
    world.collectively(lambda: peers.check_peers(world, benchmark="generate"))
    check_products(world, chosen.products)
    table = figures_table(
        *("precision", "batch", "moempi", "peer", "its rate", "ratio", "same tokens"),
        title=f"Tokens/s, {chosen.tokens} after {chosen.prompt}: {world.size} ranks of {chosen.threads} threads, "
        f"{chosen.products} products",
        caption=machine(world),
    )
    with tempfile.TemporaryDirectory() as own:
        folder = Path(world.comm.bcast(own))
        peers.make_model(world, folder, large=chosen.large)
        for precision in ("float32", "bfloat16"):
            if world.rank == 0 and llama_cpp.has_llama_cpp():
                llama_cpp.write_gguf(folder / "model", folder / GGUF, precision=precision)
            for sequences in chosen.sequences:
                for cells in _compare(world, folder, precision, sequences, chosen):
                    table.add_row(precision, str(sequences), *cells)
        world.comm.Barrier()
    if world.rank == 0:
        console().print(table)


Generate = Callable[[], tuple[float, Any]]
"""Seconds, and the new tokens (batch, tokens)."""


def _compare(world: World, folder: Path, precision: str, sequences: int, chosen: Namespace) -> list[list[str]]:
    """The cells of one batch, for each peer: both rates, their ratio, and the share of equal tokens; collective."""
    prompts = np.random.default_rng(sequences).integers(0, peers.VOCABULARY, (sequences, chosen.prompt))
    job = _job(folder, precision, sequences, chosen)
    theirs: dict[str, Generate] = {}
    if world.rank == 0:
        write_prompts(job.input.prompts, prompts.tolist())
        theirs = _peers(folder, prompts, precision, threads=world.size * chosen.threads, tokens=chosen.tokens)
    taken: dict[str, list[float]] = {"moempi": [], **{name: [] for name in theirs}}
    generated: dict[str, Any] = {}
    for _ in range(chosen.rounds + 1):
        taken["moempi"].append(step_seconds(world, job)[0])
        for name, generate in theirs.items():
            seconds, generated[name] = generate()
            taken[name].append(seconds)
        sleep_until_all(world)
    if world.rank:
        return []
    taken = {name: seconds[1:] for name, seconds in taken.items()}  # the first warms up
    of_transformers = [name for name in theirs if name != LLAMA_CPP]
    fastest = min(of_transformers, key=lambda name: median(taken[name]))
    rows = []
    for name in [fastest, *(name for name in theirs if name == LLAMA_CPP)]:
        with ResultFile(job.output.results) as results:
            pairs = zip(results.requests(), generated[name], strict=True)
            same = np.mean([record.tokens == row for record, row in pairs])
        ours, its = (f"{sequences * chosen.tokens / median(taken[each]):,.0f}" for each in ("moempi", name))
        rows.append([ours, name, its, f"{ratio(taken[name], taken['moempi']):.2f}", f"{same:.1%}"])
    return rows


def _peers(folder: Path, prompts: Any, precision: str, *, threads: int, tokens: int) -> dict[str, Generate]:
    """The functions of the peers that are installed."""
    found = peers.generators(folder / "model", prompts, tokens=tokens, precision=precision, threads=threads)
    theirs: dict[str, Generate] = {name: partial(timed, generate) for name, generate in found.items()}
    if llama_cpp.has_llama_cpp():
        run = partial(llama_cpp.generate, folder / GGUF, prompts, tokens=tokens, threads=threads, folder=folder)
        theirs[LLAMA_CPP] = lambda: run()[:2]
    return theirs


def _job(folder: Path, precision: str, sequences: int, chosen: Namespace) -> Job:
    run = {
        "backend": "numpy",
        "precision": precision,
        "products": chosen.products,
        "threads": chosen.threads,
        "max_sequences": max(sequences, chosen.lanes),
        "micro_batches": chosen.lanes,
    }
    sampling = {"max_tokens": chosen.tokens, "ignore_eos": True}
    return make_job(folder, origin="bench generate", run=run, sampling=sampling)
