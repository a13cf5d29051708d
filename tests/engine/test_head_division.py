"""An LM head that all ranks of the last stage divide gives the bits of one that each tensor group divides."""

import re

import h5py
import numpy as np
import pytest
from msgspec import structs

from engine.runs import SMALL, Run, requests_of, tokens_of
from moempi.storage.compare import compare
from moempi.storage.convert import convert
from moempi.storage.merge import merge
from moempi.storage.results import ResultFile
from mpirun import ROOT, mpirun, python
from storage.test_results import PROVENANCE

JOB = ROOT / "jobs/abacus.toml"
STAGE = {"head": "stage"}
DENSE_END = structs.replace(SMALL, dense_layers=(2, 3))
"""A model whose last stage of two has no experts: its tensor groups meet in the head alone."""
ALL_DENSE = structs.replace(SMALL, dense_layers=(0, 1, 2, 3))
LAYOUTS = [
    {},
    {"tensor": 2},
    {"stages": 2},
    {"stages": 2, "tensor": 2},
    {"stages": 2, "stage_ranks": [1, 3]},
    {"stages": 2, "stage_ranks": [3, 1]},
    {"stages": 3, "stage_ranks": [1, 1, 2]},
]
STEPS = [
    {},
    {"overlap": False},
    {"micro_batches": 5, "lanes": 3, "max_sequences": 5},
    {"micro_batches": 1, "batch_tokens": 7},
]
CASES = [
    pytest.param(model, parallel, STEPS[(number + first) % len(STEPS)], id=f"{name} {parallel}")
    for first, (name, model) in enumerate({"experts": SMALL, "dense end": DENSE_END, "dense": ALL_DENSE}.items())
    for number, parallel in enumerate(LAYOUTS)
]
LENGTHS = (5, 30, 1, 12, 3, 2, 2, 9, 17, 1, 4)


def merged(folder, comm, *, lengths=LENGTHS, limit=3, **options):
    """The tokens and the results file of a run; on rank 0."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, requests_of(*lengths, limit=limit), comm=comm, **options)
    run.lanes.run()
    run.journal.close()
    tokens = comm.gather(tokens_of(run.requests))
    if comm.rank == 0:
        paths = [folder / f"{rank}.part" for rank in range(comm.size)]
        merge(folder / "r.h5", paths, num_requests=len(lengths), provenance=PROVENANCE)
    run.lanes.free()
    return tokens, folder / "r.h5"


def columns(results):
    """All columns of a results file."""
    found = {}
    with h5py.File(results) as file:
        for group in ("requests", "output", "score"):
            if group in file:
                file[group].visititems(
                    lambda name, item, group=group: (
                        found.update({f"{group}/{name}": item[()]}) if isinstance(item, h5py.Dataset) else None
                    )
                )
    return found


def assert_equal_with_either_head(folder, comm, parallel, **options):
    folder = comm.bcast(folder)
    found = [merged(folder / head, comm, parallel=parallel | {"head": head}, **options) for head in ("tensor", "stage")]
    if comm.rank == 0:
        (tokens, whole), (divided_tokens, divided) = found
        assert divided_tokens == tokens
        result = compare(whole, divided)
        assert (result.requests, result.different, result.largest) == (len(LENGTHS), 0, 0.0)
        others = columns(divided)
        for name, values in columns(whole).items():
            if "time" not in name and not name.endswith("_s"):
                np.testing.assert_array_equal(others[name], values, err_msg=name)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("architecture", "parallel", "steps"), CASES)
def test_generation_in_any_layout(tmp_path, comm, num_ranks, architecture, parallel, steps):
    assert_equal_with_either_head(tmp_path, comm, parallel, architecture=architecture, run=steps)


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("architecture", "parallel", "steps"), CASES)
@pytest.mark.parametrize("rows", [1, 64])
def test_scoring_in_any_layout(tmp_path, comm, num_ranks, monkeypatch, architecture, parallel, steps, rows):
    """Also if groups score very different numbers of rows, a few at a time."""
    monkeypatch.setattr("moempi.layout.row_buffers.SCORED_ROWS", rows)
    options = {"task": "score", "limit": 0, "score": {"top_n": 7, "threshold": -3.7}}
    assert_equal_with_either_head(tmp_path, comm, parallel, architecture=architecture, run=steps, **options)


@pytest.mark.ranks(4)
@pytest.mark.parametrize("stages", [1, 2])
def test_fewer_requests_than_groups(tmp_path, comm, num_ranks, stages):
    """Groups without rows take every step."""
    folder = comm.bcast(tmp_path)
    tokens, _ = merged(folder, comm, lengths=[5], parallel=STAGE | {"stages": stages})
    if comm.rank == 0:
        assert [len(found) for of_rank in tokens for found in of_rank] == [3]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "abacus.h5"
    convert(ROOT / "weights/abacus", path)
    return path


@pytest.fixture
def run(weights, tmp_path, runner):
    """`run(ranks, name, *options, key=value)` runs the 256 questions into `<name>.h5`."""

    def run(num_ranks, name, *options, **settings):
        named = {"model.weights": weights, "output.results": tmp_path / f"{name}.h5", "run.precision": "float32"}
        words = [word for key, value in (named | settings).items() for word in ("--set", f"{key}={value}")]
        return runner(num_ranks).run("run", JOB, *words, *options)

    return run


TASKS = {
    "greedy": {},
    "sampled": {
        "sampling.temperature": 0.9,
        "sampling.top_p": 0.95,
        "sampling.top_logprobs": 3,
        "sampling.repetition_penalty": 1.2,
        "sampling.presence_penalty": 0.3,
    },
    "score": {"task": "score", "score.top_n": 5, "score.threshold": -4.0},
}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("task", "ranks", "stages", "tensor"), [("greedy", 4, 1, 1), ("sampled", 4, 2, 1), ("score", 8, 2, 2)]
)
def test_whole_runs(run, tmp_path, task, ranks, stages, tensor):
    layout = {"parallel.stages": stages, "parallel.tensor": tensor} | TASKS[task]
    for head in ("tensor", "stage"):
        outcome = run(ranks, head, **layout, **{"parallel.head": head})
        assert outcome.code == 0, outcome.err
    found = compare(tmp_path / "tensor.h5", tmp_path / "stage.h5")
    assert (found.requests, found.different, found.largest) == (256, 0, 0.0)
    one, other = (columns(tmp_path / f"{head}.h5") for head in ("tensor", "stage"))
    for name in one:
        if name.startswith(("output", "score")):
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.mpi
def test_a_run_that_was_stopped_goes_on_with_another_division(weights, run, tmp_path):
    """A signal to a rank of the last stage ends all ranks at a step border; requests that are finished stay so."""
    assert run(2, "whole").code == 0
    (tmp_path / "notes").mkdir()
    settings = {"model.weights": weights, "output.results": tmp_path / "stopped.h5", "run.precision": "float32"}
    finished = [0]
    for rank, dispatch, stages in ((3, 30, 2), (2, 60, 1)):
        layout = settings | {"parallel.head": "stage", "parallel.stages": stages}
        words = [word for key, value in layout.items() for word in ("--set", f"{key}={value}")]
        fault = ROOT / "tests/faults/inject_fault.py"
        command = [fault, tmp_path / "notes", "SIGUSR1", str(rank), "dispatch", str(dispatch)]
        outcome = mpirun(4, *python(*command, "run", JOB, *words))
        assert outcome.code == 75, outcome.err
        finished.append(int(re.search(r"(\d+) of 256 requests are finished", outcome.err)[1]))
    assert finished[0] < finished[1] < finished[2] < 256
    assert run(4, "stopped", **{"parallel.head": "tensor"}).code == 0
    found = compare(tmp_path / "whole.h5", tmp_path / "stopped.h5")
    assert (found.requests, found.different, found.largest) == (256, 0, 0.0)
    with ResultFile(tmp_path / "stopped.h5") as results:
        assert all(record.finish in ("stop", "length") for record in results.requests())


@pytest.mark.mpi
def test_one_rank_and_a_last_stage_of_one_tensor_group_divide_as_ever(run, tmp_path):
    for ranks, tensor in ((1, 1), (2, 2)):
        for head in ("tensor", "stage"):
            assert run(ranks, head, **{"parallel.tensor": tensor, "parallel.head": head}).code == 0
        found = compare(tmp_path / "tensor.h5", tmp_path / "stage.h5")
        assert (found.requests, found.different, found.largest) == (256, 0, 0.0)
