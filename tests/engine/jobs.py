"""Jobs for tests of the engine, checked as a job file is."""

from pathlib import Path
from typing import Any

from moempi.config.job import Job
from moempi.config.reading import read_tree


def make_job(folder: Path = Path(), **sections: Any) -> Job:
    """A job whose files are in `folder`, with these sections and keys: `make_job(run={"precision": "float32"})`."""
    files = {
        "model": {"weights": str(folder / "weights.h5")},
        "input": {"prompts": str(folder / "prompts.jsonl")},
        "output": {"results": str(folder / "results.h5")},
    }
    return read_tree(files | sections, Job, origin="test")
