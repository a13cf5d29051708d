"""The inputs of a job: what the ranks must have alike, what leaves nothing behind, and how prompts are sent."""

import shutil
import signal
import time
from argparse import Namespace
from types import SimpleNamespace

import h5py
import msgspec
import numpy as np
import pytest
from mpi4py import MPI

from engine.jobs import make_job
from engine.requests import make_request
from engine.runs import SMALL, requests_of
from moempi.commands import run as run_command
from moempi.config.job import Sampling
from moempi.engine import inputs, shares
from moempi.engine.inputs import open_inputs
from moempi.engine.rank_layout import lay_out_rank
from moempi.engine.run import run_job
from moempi.errors import StorageError
from moempi.runtime.stop import Stop
from moempi.runtime.world import AgreedExit, World
from moempi.storage.initialize import initialize
from moempi.storage.journal import journal_paths
from moempi.storage.prompt_spool import PromptCodec
from moempi.storage.results import ResultFile

TAKEN = 1


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


@pytest.mark.ranks(2)
@pytest.mark.parametrize("with_tiles", [0, 1, 2])
def test_ranks_have_fast_products_together_or_not_at_all(comm, tmp_path, monkeypatch, caplog, with_tiles):
    """As if the processors of the first ranks had tiles. A run is not continued with products of the other kind."""
    folder = comm.bcast(tmp_path)
    fast = comm.bcast(made_job(folder, run={"backend": "numpy", "products": "fast"}) if comm.rank == 0 else None)
    exact = msgspec.structs.replace(fast, run=msgspec.structs.replace(fast.run, products="exact"))
    monkeypatch.setattr(inputs, "has_fast_products", lambda run: comm.rank < with_tiles and run.products == "fast")
    opened, others = (open_and_release(job, comm) for job in (fast, exact))
    all_have_tiles = with_tiles == comm.size
    assert opened.job.run.products == ("fast" if all_have_tiles else "exact")
    assert (opened.fingerprint == others.fingerprint) == (not all_have_tiles)
    assert caplog.text.count("products are not fast") == (comm.rank == 0 and not all_have_tiles)


def open_and_release(job, comm):
    opened = open_inputs(lambda: job, World(comm), strict=True)
    if opened.lock is not None:
        opened.lock.release()
    return opened


@pytest.mark.ranks(2)
def test_a_foreign_object_in_the_weights_that_no_rank_reads_ends_all_ranks(comm, tmp_path, capfd):
    folder = comm.bcast(tmp_path)
    job = comm.bcast(made_job(folder) if comm.rank == 0 else None)
    if comm.rank == 0:
        with h5py.File(folder / "weights.h5", "r+") as file:
            file["tensors/other"] = np.zeros(3)
    comm.Barrier()
    with pytest.raises(AgreedExit) as end:
        open_inputs(lambda: job, World(comm), strict=True)
    assert end.value.code == 65
    if comm.rank == 0:
        assert "tensors/other: does not belong to this architecture" in capfd.readouterr().err


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


def test_a_prompt_file_that_changes_while_it_is_read_is_an_error(tmp_path, monkeypatch, capfd):
    job, digest_inputs = made_job(tmp_path), inputs._digest_inputs

    def change(*arguments):
        found = digest_inputs(*arguments)
        (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2]}')
        return found

    monkeypatch.setattr(inputs, "_digest_inputs", change)
    with pytest.raises(AgreedExit) as end:
        run(job)
    assert end.value.code == 65
    assert "prompts.jsonl: changed while it was read" in capfd.readouterr().err


def test_the_routing_that_is_replayed_is_not_replaced(tmp_path):
    job = made_job(tmp_path, trace={"routing": "experts"})
    assert run(job) == 0
    replays = msgspec.structs.replace(job, replay=msgspec.structs.replace(job.replay, routing=job.output.results))
    with pytest.raises(StorageError, match="same file"):
        run_command._check_outputs(Namespace(job=tmp_path / "job.toml", force=True), replays)


@pytest.mark.parametrize(
    ("lengths", "groups", "pieces"),
    [
        ((), 1, []),
        ((3, 3), 1, [2]),
        ((30, 3, 3, 3, 30), 1, [1, 3, 1]),
        ((3,) * 9, 1, [4, 4, 1]),
        ((3,) * 9, 2, [6, 3]),
        ((9, 3, 9, 9, 3), 3, [2, 2, 1]),
    ],
)
def test_prompts_are_sent_in_pieces_of_a_number_and_a_size(monkeypatch, lengths, groups, pieces):
    monkeypatch.setattr(shares, "PIECE", 4)
    monkeypatch.setattr(shares, "PIECE_BYTES", 88)
    prompts = [request.prompt for request in requests_of(*lengths)]
    sent = list(shares._shares(prompts, groups))
    assert [sum(map(len, piece)) for piece in sent] == pieces
    for group in range(groups):
        assert [prompt for piece in sent for prompt in piece[group]] == prompts[group::groups]


@pytest.mark.ranks(4)
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"stages": 2}])
@pytest.mark.parametrize("fails", [False, True])
def test_each_rank_of_the_first_stage_gets_the_prompts_of_its_group(comm, monkeypatch, parallel, fails):
    monkeypatch.setattr(shares, "PIECE", 4)
    prompts = [request.prompt for request in requests_of(*range(1, 30))]

    def on_first():
        yield from prompts
        if fails:
            raise StorageError("the disk")

    rank_layout = lay_out_rank(make_job(parallel=parallel), World(comm), SMALL, on_gpu=False)
    codec, found, failure = PromptCodec(Sampling()), [], ""
    try:
        for piece in shares.scatter_prompts(on_first() if comm.rank == 0 else (), codec, World(comm), rank_layout):
            found.append(piece)
    except StorageError as error:
        failure = str(error)
    coords, groups = rank_layout.coords, rank_layout.grid.num_groups(0)
    expected = prompts[coords.data :: groups] if coords.stage == 0 else []
    expected = [prompt.index for prompt in expected]
    received = [prompt.index for piece in found for prompt in piece]
    assert received == expected[: len(received)]
    assert fails or len(received) == len(expected)
    assert (len(found) > 0) == (coords.stage == 0)
    assert failure == ("the disk" if fails and comm.rank == 0 else "")


@pytest.mark.ranks(4)
def test_a_rank_that_does_not_take_its_piece_delays_no_other(comm):
    """Rank 1 takes its piece when the ranks after it have theirs; MPI does not buffer a piece of this size."""
    prompts = [make_request([5] * (1 << 20), 1, index=index).prompt for index in range(4)] if comm.rank == 0 else ()
    rank_layout = lay_out_rank(make_job(), World(comm), SMALL, on_gpu=False)
    pieces = shares.scatter_prompts(prompts, PromptCodec(Sampling()), World(comm), rank_layout)
    taken, limit = True, time.monotonic() + 30.0
    if comm.rank == 1:
        while not (taken := all(comm.Iprobe(rank, TAKEN) for rank in (2, 3))) and time.monotonic() < limit:
            time.sleep(0.01)
    received = [prompt.index for prompt in next(pieces)]
    if comm.rank > 1:
        comm.send(None, 1, TAKEN)
    received += [prompt.index for piece in pieces for prompt in piece]
    if comm.rank == 1:
        assert [comm.recv(source=rank, tag=TAKEN) for rank in (2, 3)] == [None, None]
    assert received == [comm.rank]
    assert taken
