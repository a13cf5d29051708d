"""A job has the same results whatever the portions are in which its prompts are read."""

import json
import re

import pytest

from moempi.cli import main
from moempi.storage.convert import convert
from moempi.storage.journal import JournalReader, JournalWriter, journal_path, journal_paths
from moempi.storage.records import RequestRecord
from moempi.storage.results import ResultFile
from moempi.storage.run_state import read_state
from mpirun import ROOT, mpirun, python

PAD = "x" * 9000
"""Metadata for which each line is read alone."""
LINES = [
    {"prompt": "12+30="},
    {"prompt": "7x8=", "id": "product"},
    {"tokens": [5] * 100, "id": "long"},
    {"prompt": "1+1=", "n": 3, "temperature": 1.0},
    {"prompt": "2+2=", "max_tokens": 1, "reference": "4"},
    *({"prompt": f"{number}+{number}="} for number in range(30)),
    {"prompt": "3+3=", "id": "product"},
    {"prompt": "4+4=", "top_logprobs": 2},
    {"prompt": "5+5=", "top_logprobs": 4},
    {"prompt": 5},
    *({"prompt": f"{number}-1=", "n": 2, "temperature": 0.5} for number in range(5)),
    {"tokens": [6] * 120, "id": "long too"},
    {"messages": [{"role": "user", "content": "6+6="}]},
    {"prompt": "9x9="},
]
NUM_REQUESTS = sum(line.get("n", 1) for line in LINES)
SMALL_CACHE = {"run.kv_memory": "400KB"}  # one page, of 64 positions, which two prompts exceed


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "abacus.h5"
    convert(ROOT / "weights/abacus", path)
    return path


@pytest.fixture
def run(weights, tmp_path):
    """`run(ranks, name, *options, key=value)` runs the LINES, a few in flight, into `<name>.h5`.

    With `stop_at`, rank 0 is requested to stop at this number of its agreements on a step.
    """
    lines = [json.dumps(line | {"metadata": {"pad": PAD}}) for line in LINES]
    (tmp_path / "prompts.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def run(num_ranks, name, *options, stop_at=0, **settings):
        (tmp_path / "notes").mkdir(exist_ok=True)
        fault = ("SIGUSR1", "0", "agree", str(stop_at)) if stop_at else ("none", "-1", "agree", "1")
        command = [ROOT / "tests/faults/inject_fault.py", tmp_path / "notes", *fault]
        given = {
            "model.weights": weights,
            "input.prompts": tmp_path / "prompts.jsonl",
            "output.results": tmp_path / f"{name}.h5",
            "run.precision": "float32",
            "run.max_sequences": 1,
            "run.micro_batches": 1,
        }
        words = [word for key, value in (given | settings).items() for word in ("--set", f"{key}={value}")]
        return mpirun(num_ranks, *python(*command, "run", ROOT / "jobs/abacus.toml", *words, *options))

    return run


def requests(path):
    """The requests of results, without their times."""
    assert main(["export", str(path), str(path.with_suffix(".jsonl"))]) == 0
    rows = list(map(json.loads, path.with_suffix(".jsonl").read_text().splitlines()))
    return [{key: value for key, value in row.items() if not key.endswith("_s")} for row in rows]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, SMALL_CACHE),
        (3, {"run.micro_batches": 2, "run.max_sequences": 2}),
        (4, {"parallel.stages": 2, "run.micro_batches": 3, "run.max_sequences": 3}),
        (4, {"parallel.tensor": 2, "exchange.hops": 2, "topology.ranks_per_node": 2}),
        (2, {"task": "score"}),
    ],
    ids=["too long", "data parallel", "stages", "tensor groups", "score"],
)
def test_portions_change_no_result(run, tmp_path, ranks, settings):
    whole, portions = (run(ranks, name, **settings, **{"input.ahead": n}) for name, n in (("whole", 0), ("read", 1)))
    assert whole.code == portions.code == 0, portions.err
    assert f"prompts.jsonl: {NUM_REQUESTS} requests, 2 of them refused, JSON lines" in whole.err
    assert "so far" not in whole.err
    assert "prompts.jsonl: 1 requests so far, JSON lines" in portions.err
    assert f"prompts.jsonl: {NUM_REQUESTS} requests, 2 of them refused, JSON lines" in portions.err
    expected = requests(tmp_path / "whole.h5")
    assert requests(tmp_path / "read.h5") == expected
    assert len(expected) == NUM_REQUESTS
    assert sum(row["finish"] == "error" for row in expected) == 3 + 2 * (settings is SMALL_CACHE)
    state = read_state(tmp_path / "read.h5")
    assert (state.state, state.requests, state.finished) == ("finished", NUM_REQUESTS, NUM_REQUESTS)


def recorded(results):
    """The requests in the journals, in order, each as often as it was computed."""
    found = []
    for path in journal_paths(results):
        with JournalReader(path) as journal:
            found += [record.index for _, record in journal.records() if isinstance(record, RequestRecord)]
    return sorted(found)


@pytest.mark.mpi
def test_a_stopped_run_goes_on_with_other_portions_and_computes_nothing_again(run, tmp_path):
    assert run(2, "whole").code == 0
    results, before = tmp_path / "read.h5", []
    for ranks, ahead, agreed in ((2, 1, 30), (1, 3, 70)):
        stopped = run(ranks, "read", stop_at=agreed, **{"input.ahead": ahead, **SMALL_CACHE})
        assert stopped.code == 75, stopped.err
        finished = re.search(r"(\d+) of (\d+) requests that were read are finished", stopped.err)
        now = recorded(results)
        assert len(before) < len(now) == len(set(now)) == int(finished[1]) < int(finished[2]) < NUM_REQUESTS
        assert set(before) < set(now)
        before = now
    assert run(1, "read", **{"input.ahead": 5}).code == 0
    assert requests(results) == requests(tmp_path / "whole.h5")
    assert not journal_paths(results)


@pytest.mark.mpi
def test_a_line_that_replays_a_file_after_the_first_portion_is_an_error_that_names_the_key(run, tmp_path):
    lines = [*({"prompt": "1+1="},) * 12, {"prompt": "2+2=", "replay": "routing.h5"}]
    prompts = tmp_path / "late.jsonl"
    prompts.write_text("".join(f"{json.dumps(line | {'metadata': {'pad': PAD}})}\n" for line in lines))
    settings = {"input.prompts": prompts, "input.ahead": 1}
    assert run(1, "late", **settings).code == 0
    with ResultFile(tmp_path / "late.h5") as results:
        errors = [record.error for record in results.requests()]
    assert errors[:-1] == [""] * 12
    assert errors[-1] == f"{prompts}:13: replay: no line of the first portion has one; input.ahead = 0 reads all first"


@pytest.mark.mpi
def test_a_journal_with_a_request_that_the_job_does_not_have_is_refused(run, tmp_path):
    assert run(1, "read", "--max-minutes", "0", **{"input.ahead": 1}).code == 75
    results = tmp_path / "read.h5"
    (journal,) = journal_paths(results)
    with JournalReader(journal) as reader:
        fingerprint = reader.fingerprint
    with JournalWriter(journal_path(results, 7), fingerprint=fingerprint) as writer:
        writer.append(RequestRecord(index=10**15, id="x", finish="error", error="of another job"))
    outcome = run(1, "read", **{"input.ahead": 1})
    assert outcome.code == 74
    assert f"has a request {10**15}, the job has {NUM_REQUESTS} requests" in outcome.lines[-1]
