"""The shipped model with a chat template, as a weight file, and what a job makes of prompts."""

import json
import shutil
from pathlib import Path

import numpy as np
from mpi4py import MPI

from engine.jobs import make_job
from moempi.engine.run import run_job
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.convert import convert
from moempi.storage.results import ResultFile
from mpirun import ROOT

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def write_model(folder: Path) -> Path:
    """The weight file of weights/abacus with TEMPLATE as its chat template."""
    shutil.copytree(ROOT / "weights/abacus", folder / "hub")
    (folder / "hub/chat_template.jinja").write_text(TEMPLATE)
    convert(folder / "hub", folder / "weights.h5")
    return folder / "weights.h5"


def job_records(folder, lines, **sections):
    """The records of a job with these prompt lines on this process alone, and the weights in `folder`."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = make_job(folder, **sections)
    run_job(job, job_text="", world=World(MPI.COMM_SELF), stop=Stop(), strict=False)
    with ResultFile(job.output.results) as results:
        return list(results.requests())


def same(found, expected) -> bool:
    """Whether two lists of numbers are the same, NaN included."""
    return np.array_equal(np.array(found, np.float32), np.array(expected, np.float32), equal_nan=True)
