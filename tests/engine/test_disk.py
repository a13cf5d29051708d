"""A job that records more of its prompts than the disk holds is refused before it computes."""

import shutil
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from engine.jobs import make_job
from engine.runs import SMALL, requests_of
from moempi.config.traces import least_recorded_bytes
from moempi.engine.disk import require_disk
from moempi.errors import StorageError

WORLD = SimpleNamespace(comm=MPI.COMM_SELF, rank=0, collectively=lambda act: act())


@pytest.mark.parametrize(
    ("sections", "rows"),
    [
        ({"trace": {"hidden": [1]}}, 12),
        ({"trace": {"hidden": [1], "hidden_positions": "last"}}, 2),
        ({"trace": {"routing": "experts"}}, 12),
        ({"task": "score", "score": {"top_n": 3}}, 12),
        ({"task": "score", "score": {"threshold": -9.0}}, 12),
    ],
)
def test_a_disk_that_is_a_byte_too_small_is_named(tmp_path, monkeypatch, sections, rows):
    job, requests = make_job(tmp_path / "new/folder", **sections), requests_of(4, 8)
    needed = 2 * rows * sum(least_recorded_bytes(job, SMALL).values())
    for free in (needed, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        if free == needed:
            require_disk(job, WORLD, SMALL, requests)
        else:
            with pytest.raises(StorageError, match=f"{tmp_path} has"):
                require_disk(job, WORLD, SMALL, requests)


def test_a_job_that_records_nothing_needs_no_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    require_disk(make_job(tmp_path), WORLD, SMALL, requests_of(4, 8))
