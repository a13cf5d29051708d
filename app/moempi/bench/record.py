"""`moempi bench record`: what recording costs, as processor time of the shipped job's steps beside plain scoring.

The jobs run alternately. Processor time, of all threads, depends less on other programs than seconds do; of each job
the least time of all rounds counts. Start it on one rank: ranks that wait for each other spend processor time.
"""

import json
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moempi.bench.jobs import WEIGHTS, make_job, silently_run
from moempi.bench.measure import Clock, machine
from moempi.commands.flags import count
from moempi.engine.engine import Engine
from moempi.errors import UsageError
from moempi.observe.console import console, figures_table
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.convert import convert

PLAIN = "nothing"
RECORDED: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "routing, experts": {"trace": {"routing": "experts"}},
    "hidden states of a layer": {"trace": {"hidden": [3]}},
    "top-20": {"score": {"top_n": 20}},
    "tokens above -5": {"score": {"threshold": -5.0}},
    "statistics": {"trace": {"statistics": True}},
}


def add_flags(parser: ArgumentParser) -> None:
    """The job, and how often."""
    parser.add_argument("--model", type=Path, default=Path("weights/abacus"), help="checkpoint (weights/abacus)")
    parser.add_argument("--prompts", type=Path, default=Path("jobs/abacus.jsonl"), help="JSONL (jobs/abacus.jsonl)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16", help="(bfloat16)")
    parser.add_argument("--repeats", type=count, default=4, help="times that a job has the prompts (4)")
    parser.add_argument("--rounds", type=count, default=15, help="runs of each job (15)")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective. Raises UsageError on several ranks."""
    if world.size > 1:
        raise UsageError("bench record counts processor time, which waiting ranks spend too; start it on one rank")
    with tempfile.TemporaryDirectory() as own:
        folder = Path(own)
        convert(chosen.model, folder / WEIGHTS)
        (folder / "prompts.jsonl").write_text(_repeated(chosen.prompts, chosen.repeats), encoding="utf-8")
        seconds: dict[str, list[float]] = {name: [] for name in RECORDED}
        for _ in range(chosen.rounds + 1):
            for name in RECORDED:
                seconds[name].append(_step_seconds(world, folder, name, precision=chosen.precision))
    least = {name: min(taken[1:]) for name, taken in seconds.items()}  # the first warms up
    title = f"Processor time of scoring {chosen.prompts.name} {chosen.repeats} times"
    table = figures_table("recorded", "ms", "over nothing", title=title, caption=machine(world))
    for name, taken in least.items():
        table.add_row(name, f"{1000 * taken:,.0f}", f"{taken / least[PLAIN] - 1:+.1%}")
    console().print(table)


def _repeated(prompts: Path, repeats: int) -> str:
    """The lines of a prompt file, several times, without their ids."""
    lines = [json.loads(line) for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [json.dumps({key: value for key, value in line.items() if key != "id"}) for line in lines]
    return "\n".join(kept * repeats)


def _step_seconds(world: World, folder: Path, name: str, *, precision: str) -> float:
    """Processor time of the steps of a job that records `name`."""
    run = {"backend": "numpy", "precision": precision, "threads": 1}
    job = make_job(folder, origin="bench record", task="score", run=run, **RECORDED[name])
    with _step_clock() as clock:
        silently_run(world, job, stop=Stop())
    return clock.seconds


@contextmanager
def _step_clock() -> Iterator[Clock]:
    """Inside the block, the clock counts the processor time of all steps."""
    clock, engine_run = Clock(), Engine.run

    def timed(self: Engine, *given: Any) -> float:
        begin = time.process_time()
        seconds = engine_run(self, *given)
        clock.seconds += time.process_time() - begin
        return seconds

    with patch.object(Engine, "run", timed):
        yield clock
