"""A finished request leaves nothing behind but its record."""

import gc
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from engine.jobs import make_job
from moempi.backend.values import LogitAdjustment, SampledTokens
from moempi.comm.batch import Batch
from moempi.engine.request import Request
from moempi.engine.run import run_job
from moempi.runtime.world import World
from moempi.storage.convert import convert
from moempi.storage.journal import JournalReader, journal_path
from moempi.storage.prompts import Prompt
from moempi.storage.records import RequestRecord
from mpirun import ROOT

KINDS = (Request, Prompt, SampledTokens, LogitAdjustment, Batch)
PROMPTS = [
    {"prompt": "72+71="},
    {"prompt": "sort 467652:", "max_tokens": 9, "ignore_eos": True, "top_logprobs": 3},
    {"prompt": "6x325=", "max_tokens": 20, "ignore_eos": True, "stop": ["5"]},
    {"prompt": "84-15=", "temperature": 1.0, "repetition_penalty": 1.2},
    {"tokens": [5, 6, 7]},
    {"tokens": [5, 99]},  # beyond the vocabulary
    {"prompt": "1+1=" * 40},  # beyond the model's positions
    {"prompt": "1+1=" * 20},  # beyond the cache
    {"prompt": "12+3=", "max_tokens": 0},  # a bad line
] * 2
SLOTS = 3
MOVES_CHOICES = {"mode": "capacity", "capacity": 1.0, "sample": 2}


class Observed(World):
    """Notes how many requests are alive when the journal of `results` has grown; `stop`s after `most` records."""

    def __init__(self, results, *, most):
        super().__init__(MPI.COMM_SELF)
        self.stop = SimpleNamespace(requested=False, reason="test", end_of_steps=lambda: None)
        self.living = {}
        self._journal = journal_path(results, 0)
        self._most = most

    def alive(self, where):
        super().alive(where)
        if where.startswith("agree"):
            with JournalReader(self._journal) as journal:
                recorded = sum(isinstance(record, RequestRecord) for _, record in journal.records())
            if recorded not in self.living:
                self.living[recorded] = live_objects()
            self.stop.requested = recorded >= self._most


def live_objects():
    """The number of objects of each kind made since the collector was frozen."""
    found = Counter(type(thing) for thing in gc.get_objects())
    return {kind: found[kind] for kind in KINDS}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "abacus.h5"
    convert(ROOT / "weights/abacus", path)
    return path


@pytest.mark.parametrize(
    ("sections", "most", "kept"),
    [
        ({}, 18, 0),
        ({"trace": {"routing": True}, "run": {"micro_batches": 1}}, 18, 0),
        ({"task": "score", "score": {"top_n": 2}}, 18, 0),
        ({"run": {"kv_memory": "500KB"}}, 18, 0),  # one page: long requests wait for the end and are refused
        ({"balance": MOVES_CHOICES}, 18, 2),  # the sample is scored again at the end
        ({}, 9, 0),  # stopped
    ],
)
def test_a_request_is_alive_from_its_admission_until_its_record_is_written(tmp_path, weights, sections, most, kept):
    lines = [json.dumps(prompt | {"id": f"q{number}"}) for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    run = {"max_sequences": SLOTS, "precision": "float32"} | sections.get("run", {})
    job = make_job(tmp_path, **sections | {"model": {"weights": str(weights)}, "run": run})
    world = Observed(job.output.results, most=most)
    gc.collect()
    gc.freeze()
    try:
        code = run_job(job, job_text="", world=world, stop=world.stop, strict=False)
        gc.collect()
        left = live_objects()
    finally:
        gc.unfreeze()
    assert code == (0 if most == len(PROMPTS) else 75)
    assert len(world.living) >= 5
    for recorded, living in world.living.items():
        assert living[Request] <= min(SLOTS, len(PROMPTS) - recorded) + kept
    assert not any(left.values())
