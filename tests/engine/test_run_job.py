"""A whole job inside a program that goes on afterwards, as a benchmark does."""

import os
import signal
import threading
import time

import pytest
from mpi4py import MPI

from engine.jobs import make_job
from engine.runs import SMALL
from moempi.engine.run import run_job
from moempi.errors import StorageError
from moempi.runtime.stop import Stop
from moempi.runtime.world import AgreedExit, World
from moempi.storage.initialize import initialize
from moempi.storage.journal import JournalWriter
from moempi.storage.merge import merge
from moempi.storage.run_state import read_state, state_path, write_state


def run_alone(job):
    usr1 = signal.getsignal(signal.SIGUSR1)
    try:
        assert run_job(job, job_text="", world=World(MPI.COMM_SELF), stop=Stop(), strict=True) == 0
    finally:
        signal.signal(signal.SIGUSR1, usr1)


def test_a_run_touches_its_state_in_a_long_phase_without_steps(tmp_path, monkeypatch):
    initialize(SMALL, tmp_path / "weights.h5", seed=1)
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2, 3]}')
    job = make_job(tmp_path, exchange={"transport": "alltoallv"}, sampling={"max_tokens": 2, "ignore_eos": True})
    state, touched = state_path(job.output.results), []

    def merge_slowly(*arguments, **named):
        os.utime(state, (0, 0))
        limit = time.monotonic() + 10
        while not touched and time.monotonic() < limit:
            touched.extend([True] * (state.stat().st_mtime > 0))
        return merge(*arguments, **named)

    monkeypatch.setattr("moempi.engine.restart.TOUCH_EVERY_S", 0.01)
    monkeypatch.setattr("moempi.engine.run.merge", merge_slowly)
    run_alone(job)
    assert touched
    for thread in threading.enumerate():
        if thread.name == "state":
            thread.join(10)
            assert not thread.is_alive()


def test_no_step_waits_for_the_state_to_be_written(tmp_path, monkeypatch):
    initialize(SMALL, tmp_path / "weights.h5", seed=1)
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2, 3]}')
    job = make_job(tmp_path, exchange={"transport": "alltoallv"}, sampling={"max_tokens": 30, "ignore_eos": True})
    written, main = [], threading.current_thread()

    def write(results, state):
        is_step = len(written) > 0 and state.state == "running"
        time.sleep(0.05 * is_step)  # the run ends meanwhile
        written.append((state.state, threading.current_thread() is main))
        write_state(results, state)

    def merge_later(*arguments, **named):
        limit = time.monotonic() + 10
        while len(written) < 2 and time.monotonic() < limit:
            time.sleep(0.01)
        return merge(*arguments, **named)

    monkeypatch.setattr("moempi.engine.run.merge", merge_later)
    monkeypatch.setattr("moempi.engine.restart.STATE_PAUSE_S", 0.0)
    monkeypatch.setattr("moempi.engine.restart.STATE_MAX_PAUSE_S", 0.0)
    monkeypatch.setattr("moempi.engine.restart.write_state", write)
    run_alone(job)
    assert (written[0], written[-1]) == (("running", True), ("finished", True))
    assert set(written[1:-1]) == {("running", False)}
    assert read_state(job.output.results).state == "finished"


@pytest.mark.ranks(2)
def test_a_failure_on_which_the_ranks_agree_stays_in_the_state(comm, tmp_path, monkeypatch):
    folder, written, close = comm.bcast(tmp_path), [], JournalWriter.close
    if comm.rank == 0:
        initialize(SMALL, folder / "weights.h5", seed=1)
        (folder / "prompts.jsonl").write_text('{"tokens": [1, 2, 3]}\n{"tokens": [1, 2, 4]}')
    comm.Barrier()
    job = make_job(folder, sampling={"max_tokens": 6, "ignore_eos": True})

    def write_slowly(results, state):
        if state.state == "running" and state.finished > 0:
            (folder / "writes").touch()
            time.sleep(0.3)  # rank 1 fails meanwhile
        write_state(results, state)
        written.append((state.state, state.finished))

    def fail(journal):
        close(journal)
        if comm.rank == 1:
            limit = time.monotonic() + 20
            while not (folder / "writes").exists() and time.monotonic() < limit:
                time.sleep(0.01)
            raise StorageError("1.part: cannot be written: Input/output error")

    monkeypatch.setattr("moempi.engine.restart.STATE_PAUSE_S", 0.0)
    monkeypatch.setattr("moempi.engine.restart.STATE_MAX_PAUSE_S", 0.0)
    monkeypatch.setattr("moempi.engine.restart.write_state", write_slowly)
    monkeypatch.setattr(JournalWriter, "close", fail)
    with pytest.raises(AgreedExit):
        run_job(job, job_text="", world=World(comm), stop=Stop(), strict=True)
    time.sleep(0.5)
    comm.Barrier()
    state = read_state(job.output.results)
    assert (state.state, state.exit_code, state.rank) == ("failed", StorageError.exit_code, 1)
    assert written[-1][0] == ("running" if comm.rank == 0 else "failed")
    assert comm.rank > 0 or written[-1][1] > 0


def test_after_a_finished_job_the_program_still_fails_and_is_still_interrupted(tmp_path):
    initialize(SMALL, tmp_path / "weights.h5", seed=1)
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2, 3]}')
    job = make_job(tmp_path, exchange={"transport": "alltoallv"}, sampling={"max_tokens": 2, "ignore_eos": True})
    world, handler, calls = World(MPI.COMM_SELF), signal.getsignal(signal.SIGTERM), []
    usr1 = signal.getsignal(signal.SIGUSR1)
    try:
        for times in (1, 2):
            options = {"job_text": "", "world": world, "stop": Stop(), "strict": True}
            assert (
                run_job(job, **options, on_finished=lambda code: calls.append(read_state(job.output.results).state))
                == 0
            )
            assert calls == ["finished"] * times
            assert signal.getsignal(signal.SIGTERM) is handler
            assert world._on_failure("a later failure", 70) == 70
            assert read_state(job.output.results).state == "finished"
    finally:
        signal.signal(signal.SIGUSR1, usr1)
