"""`moempi bench record`: what recording costs, as processor time of the shipped job's steps beside plain scoring.

One engine is loaded. Each kind of values has lanes and a journal of its own over the same weights and cache, so that
runs differ only in what they record. A run scores PIECE prompts, some milliseconds. The kinds take turns at each piece
in an order drawn for it, and a ratio is of two runs of the same piece in the same turn: a busy machine slows both.
Plain scoring takes part twice: the second shows the noise. Start it on one rank: ranks that wait for each other spend
processor time.
"""

import json
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.bench.jobs import WEIGHTS, make_job
from moempi.bench.measure import machine
from moempi.commands.flags import count
from moempi.config.job import Job
from moempi.engine.admitted import AdmittedRequests, admit
from moempi.engine.deployment import Deployment, deploy
from moempi.engine.engine import Engine, load_engine, make_task
from moempi.engine.lanes import make_lanes
from moempi.engine.recorder import Recorder
from moempi.errors import UsageError
from moempi.layout.memory import pages_for
from moempi.observe.console import console, figures_table
from moempi.observe.progress import Progress
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.convert import convert
from moempi.storage.journal import JournalWriter, journal_path
from moempi.storage.prompt_spool import PromptCodec, PromptSpool
from moempi.storage.prompts import Prompt, make_prompts
from moempi.storage.weights import WeightFile

PLAIN = "nothing"
RECORDED: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "nothing, again": {},
    "routing, experts": {"trace": {"routing": "experts"}},
    "hidden states of a layer": {"trace": {"hidden": [3]}},
    "top-20": {"score": {"top_n": 20}},
    "tokens above -5": {"score": {"threshold": -5.0}},
    "statistics": {"trace": {"statistics": True}},
}
PIECE = 32
"""Prompts of a run."""


def add_flags(parser: ArgumentParser) -> None:
    """The job, and how often."""
    parser.add_argument("--model", type=Path, default=Path("weights/abacus"), help="checkpoint (weights/abacus)")
    parser.add_argument("--prompts", type=Path, default=Path("jobs/abacus.jsonl"), help="JSONL (jobs/abacus.jsonl)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--rounds", type=count, default=40, help="times that a kind has all prompts (40)")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective. Raises UsageError on several ranks."""
    if world.size > 1:
        raise UsageError("bench record counts processor time, which waiting ranks spend too; start it on one rank")
    with tempfile.TemporaryDirectory() as own:
        convert(chosen.model, Path(own) / WEIGHTS)
        scoring = _load(world, Path(own), chosen.prompts, precision=chosen.precision)
        seconds = _measure(scoring, chosen.rounds)
        scoring.engine.free()
    title = f"Processor time of scoring {chosen.prompts.name}, medians of {chosen.rounds} rounds"
    table = figures_table("recorded", "ms", "over nothing", "±", title=title, caption=machine(world))
    for name, taken in seconds.items():
        over, error = _median(taken / seconds[PLAIN])
        table.add_row(name, f"{1000 * np.median(taken, axis=0).sum():,.1f}", f"{over - 1:+.1%}", f"{error:.1%}")
    console().print(table)


@dataclass(frozen=True, slots=True)
class _Scoring:
    """An engine, and the pieces of the prompts that it scores; with files in `folder`."""

    engine: Engine
    pieces: Sequence[Sequence[Prompt]]
    folder: Path
    precision: str

    def step_seconds(self, name: str, prompts: Sequence[Prompt]) -> float:
        """Processor time of the steps that score the prompts and record `name`."""
        job, engine = _job(self.folder, name, precision=self.precision), self.engine
        deployment, journal_at = engine.deployment, journal_path(job.output.results, 0)
        with JournalWriter(journal_at, fingerprint=name) as journal, _admit(deployment, prompts) as admitted:
            hidden = job.trace.hidden_positions if job.trace.hidden else None
            recorder = Recorder(
                journal, task=job.task, writes_records=True, on_progress=lambda counts: None, hidden=hidden
            )
            context = replace(engine.lanes.each[0].context, recorder=recorder)
            lanes = make_lanes(
                job, deployment.world, deployment.rank_layout, context, pending=deployment.pending, first_step=0
            )
            recording = replace(engine, lanes=lanes)
            recording.submit(admitted)
            task = make_task(job, deployment.tokenizer, top=0)
            begin = time.process_time()
            recording.run(task, recorder)
            seconds = time.process_time() - begin
            lanes.free()
        journal_at.unlink()
        if recorder.finishes != {"length": len(prompts)}:
            raise RuntimeError(f"of {len(prompts)} prompts not all are scored: {dict(recorder.finishes)}")
        return seconds


def _measure(scoring: _Scoring, rounds: int) -> dict[str, npt.NDArray[np.float64]]:
    """Seconds (rounds, pieces) of each kind; a round before them warms up."""
    draw = np.random.default_rng(0)
    seconds = {name: np.empty((1 + rounds, len(scoring.pieces))) for name in RECORDED}
    for place in np.ndindex(1 + rounds, len(scoring.pieces)):
        for name in draw.permutation([*RECORDED]).tolist():
            seconds[name][place] = scoring.step_seconds(name, scoring.pieces[place[1]])
    return {name: taken[1:] for name, taken in seconds.items()}


def _median(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The median of values, and its standard error, if they were normal with the same quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return median, 0.93 * (high - low) / values.size**0.5


def _load(world: World, folder: Path, prompts: Path, *, precision: str) -> _Scoring:
    """An engine with a cache for as many sequences of all positions as it computes at a time; collective, blocks."""
    job = _job(folder, PLAIN, precision=precision)
    with WeightFile.open(job.model.weights) as weights:
        deployment = deploy(job, world, weights, num_gpus=0, has_gpus=False)
        pages = len(deployment.slots) * pages_for(weights.architecture.max_positions)
        idle = Recorder([], task=job.task, writes_records=False, on_progress=lambda counts: None)
        engine = load_engine(deployment, idle, Stop(), pages=pages, progress=Progress(0, enabled=False))
    if engine is None:
        raise RuntimeError("the loading was stopped, which nothing requests")
    lines = prompts.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    made = make_prompts(rows, sampling=job.sampling)
    pieces = [made[first : first + PIECE] for first in range(0, len(made), PIECE)]
    return _Scoring(engine, pieces, folder, precision)


def _job(folder: Path, name: str, *, precision: str) -> Job:
    """The job that scores and records `name`."""
    run = {"backend": "numpy", "precision": precision, "threads": 1}
    return make_job(folder, origin="bench record", task="score", run=run, **RECORDED[name])


def _admit(deployment: Deployment, prompts: Sequence[Prompt]) -> AdmittedRequests:
    """The requests of prompts that the engine can compute."""
    spool = partial(PromptSpool, PromptCodec(deployment.job.sampling), tempfile.gettempdir())
    return admit([prompts], deployment, task=deployment.job.task, chats=None, spool=spool)
