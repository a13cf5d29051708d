"""Jobs that a benchmark runs without output, on all ranks, in a folder that all ranks can read."""

import io
import json
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from moempi.config.job import Job
from moempi.config.reading import read_tree
from moempi.engine.run import run_job
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.results import ResultFile

WEIGHTS = "model.h5"
"""The weight file in the folder of a job."""


def make_job(folder: Path, *, origin: str, **sections: Any) -> Job:
    """The job with these sections whose files are in `folder`; errors begin with `origin`."""
    files = {
        "model": {"weights": str(folder / WEIGHTS)},
        "input": {"prompts": str(folder / "prompts.jsonl")},
        "output": {"results": str(folder / "results.h5")},
    }
    return read_tree({**files, **sections}, Job, origin=origin)


def write_prompts(path: str | Path, prompts: Iterable[Sequence[int]]) -> None:
    """Write a prompt file; each prompt is a sequence of tokens."""
    lines = (json.dumps({"id": str(number), "tokens": [*tokens]}) for number, tokens in enumerate(prompts))
    Path(path).write_text("\n".join(lines), encoding="utf-8")


def silently_run(world: World, job: Job, *, stop: Stop) -> None:
    """Run a job on the ranks of `world`, without output; collective, blocks.

    Raises RuntimeError if the job does not end with 0: a run that ends early would be measured as a fast one.
    """
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        code = run_job(job, job_text="", world=world, stop=stop, strict=True)
    if code:
        raise RuntimeError(f"the measured job ended with exit code {code}")


def step_seconds(world: World, job: Job) -> tuple[float, int]:
    """Run a job; return the seconds of all steps on the slowest rank, without start and loading, and their number.

    Collective, blocks; the values are equal on all ranks.
    """
    world.comm.Barrier()
    silently_run(world, job, stop=Stop())
    world.comm.Barrier()
    own = (0.0, 0)
    if world.rank == 0:
        with ResultFile(job.output.results) as results:
            seconds, steps = results.timing()
        own = float(seconds.max()), int(steps.max())
    seconds_and_steps: tuple[float, int] = world.comm.bcast(own)
    return seconds_and_steps
