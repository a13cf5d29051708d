"""The inputs of a job: what the ranks must have alike, what leaves nothing behind, and how prompts are sent."""

import shutil
import signal
from argparse import Namespace
from types import SimpleNamespace

import msgspec
import pytest
from mpi4py import MPI

from engine.jobs import make_job
from engine.runs import SMALL, requests_of
from moempi.commands import run as run_command
from moempi.engine import shares
from moempi.engine.inputs import open_inputs
from moempi.engine.run import run_job
from moempi.errors import StorageError
from moempi.runtime.stop import Stop
from moempi.runtime.world import AgreedExit, World
from moempi.storage.initialize import initialize
from moempi.storage.journal import journal_paths
from moempi.storage.results import ResultFile


def made_job(folder, prompts='{"tokens": [1, 2, 3]}', **sections):
    initialize(SMALL, folder / "weights.h5", seed=1)
    (folder / "prompts.jsonl").write_text(prompts)
    sampling = {"max_tokens": 2, "ignore_eos": True}
    return make_job(folder, exchange={"transport": "alltoallv"}, sampling=sampling, **sections)


def run(job, **options):
    usr1 = signal.getsignal(signal.SIGUSR1)
    try:
        return run_job(job, job_text="", world=World(MPI.COMM_SELF), stop=Stop(), strict=False, **options)
    finally:
        signal.signal(signal.SIGUSR1, usr1)


@pytest.mark.ranks(2)
def test_ranks_that_read_different_jobs_end(comm, tmp_path):
    folder = comm.bcast(tmp_path)
    job = made_job(folder) if comm.rank == 0 else None
    job = comm.bcast(job)
    if comm.rank == comm.size - 1:
        job = msgspec.structs.replace(job, run=msgspec.structs.replace(job.run, precision="float32"))
    with pytest.raises(AgreedExit) as end:
        open_inputs(lambda: job, World(comm), strict=True)
    assert end.value.code == 65


@pytest.mark.parametrize("positions", ["all", "last", "output"])
def test_a_prompt_that_cannot_be_used_has_no_hidden_states(tmp_path, positions):
    job = made_job(
        tmp_path, '{"prompt": "x"}\n{"tokens": [1, 2]}', trace={"hidden": [1], "hidden_positions": positions}
    )
    assert run(job) == 0
    with ResultFile(job.output.results) as results:
        assert [record.finish for record in results.requests()] == ["error", "length"]


def test_a_job_that_is_refused_for_what_it_records_leaves_no_journals(tmp_path, monkeypatch):
    job = made_job(tmp_path, trace={"hidden": [1]})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
        with pytest.raises(AgreedExit) as end:
            run(job)
    assert end.value.code == 74
    assert not journal_paths(job.output.results)


def test_the_routing_that_is_replayed_is_not_replaced(tmp_path):
    job = made_job(tmp_path, trace={"routing": "experts"})
    assert run(job) == 0
    replays = msgspec.structs.replace(job, replay=msgspec.structs.replace(job.replay, routing=job.output.results))
    with pytest.raises(StorageError, match="same file"):
        run_command._check_outputs(Namespace(job=tmp_path / "job.toml", force=True), replays)


@pytest.mark.parametrize(
    ("lengths", "pieces"), [((), []), ((3, 3), [2]), ((30, 3, 3, 3, 30), [1, 3, 1]), ((3,) * 9, [4, 4, 1])]
)
def test_prompts_are_sent_in_pieces_of_a_number_and_a_size(monkeypatch, lengths, pieces):
    monkeypatch.setattr(shares, "PIECE", 4)
    monkeypatch.setattr(shares, "PIECE_BYTES", 80)
    prompts = [request.prompt for request in requests_of(*lengths)]
    sent = list(shares._pieces(prompts))
    assert [len(piece) for piece in sent] == [*pieces, 0]
    assert [prompt.index for piece in sent for prompt in piece] == list(range(len(lengths)))
