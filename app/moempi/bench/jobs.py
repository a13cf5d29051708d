"""Jobs that a benchmark runs: quietly, on all ranks, in a folder that they share."""

import io
import json
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from moempi.config.job import Job
from moempi.engine.run import run_job
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.results import ResultFile


def write_prompts(path: str | Path, prompts: Iterable[Sequence[int]]) -> None:
    """A prompt file of token ids."""
    lines = (json.dumps({"id": str(number), "tokens": [*tokens]}) for number, tokens in enumerate(prompts))
    Path(path).write_text("\n".join(lines), encoding="utf-8")


def step_seconds(world: World, job: Job) -> tuple[float, int]:
    """Run a job; seconds of all its steps on the slowest rank, without starting and loading, and how many steps.

    Collective; the same on all ranks.
    """
    world.comm.Barrier()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        run_job(job, job_text="", world=world, stop=Stop(), strict=True)
    world.comm.Barrier()
    found = (0.0, 0)
    if world.rank == 0:
        with ResultFile(job.output.results) as results:
            seconds, steps = results.timing()
        found = float(seconds.max()), int(steps.max())
    seconds_and_steps: tuple[float, int] = world.comm.bcast(found)
    return seconds_and_steps
