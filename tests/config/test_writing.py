"""A job written as a file is the same job when it is read there."""

import datetime
import os
from pathlib import Path

import pytest
from msgspec import structs

from moempi.config.job import Job, read_job_file
from moempi.config.reading import read_tree
from moempi.config.writing import job_text

TEXTS = 'a "quoted" \\ back\nline\ttab \x7f\x01 \u00e9 \U0001f600'
TREE = {
    "model": {"weights": "weights/model.h5", "architecture": "arch.toml"},
    "input": {"prompts": "prompts.jsonl", "special_tokens": False},
    "output": {"results": "out/results.h5"},
    "task": "score",
    "run": {"micro_batches": "auto", "timeout_s": 1.5e7, "kv_memory": "1.5GB"},
    "sampling": {"stop": [TEXTS, "b"], "logit_bias": {5: -100.0}, "temperature": 1e-9, "ignore_eos": True},
    "chat": {"template_kwargs": {"a b": [1, {"x.y": True}], "day": datetime.date(2025, 12, 31), TEXTS: []}},
    "parallel": {"stages": 2, "stage_layers": [1, 2]},
    "topology": {"file": "/absolute/topology.json"},
}


def absolute(job):
    """The job with the real paths of its files."""
    sections = {"model": ["weights", "architecture"], "input": ["prompts"], "output": ["results"]}
    for section, names in sections.items():
        values = {name: os.path.realpath(getattr(getattr(job, section), name)) for name in names}
        job = structs.replace(job, **{section: structs.replace(getattr(job, section), **values)})
    return job


@pytest.mark.parametrize("folder", [".", "deep/er", "link", "link/below"])
def test_a_written_job_is_the_same_job_where_it_lies(folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere/real/below").mkdir(parents=True)
    (tmp_path / "here/deep/er").mkdir(parents=True)
    (tmp_path / "here/link").symlink_to(tmp_path / "elsewhere/real")
    monkeypatch.chdir(tmp_path / "here")
    job = read_tree(TREE, Job, origin="test")
    out = Path(folder) / "job.toml"
    out.write_text(job_text(job, out.parent))
    assert absolute(read_job_file(out)) == absolute(job)


def test_defaults_and_stdin_are_left_as_they_are(tmp_path):
    job = read_tree(
        {"model": {"weights": "/m.h5"}, "input": {"prompts": "-"}, "output": {"results": "/r.h5"}}, Job, origin="test"
    )
    expected = '\n[model]\nweights = "/m.h5"\n\n[input]\nprompts = "-"\n\n[output]\nresults = "/r.h5"\n'
    assert job_text(job, tmp_path) == expected
