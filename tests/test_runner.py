"""Ranks that stay: whatever goes wrong in them fails a test, and the next job has new ranks."""

import atexit
import os
import subprocess
import sys
import time

import pytest

import mpirun as launching
from runner import STAY, Runner

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(not STAY, reason="ranks end after each job")]

RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))


def main(words: list[str]) -> int | None:
    """What the ranks of these tests run instead of the program."""
    match words:
        case ["nothing"]:
            return None
        case ["codes", *codes]:
            return int(codes[RANK])
        case ["exit", *text]:
            sys.exit(*text)
        case ["hang"] if RANK:
            time.sleep(2 * launching.LIMIT_S)
        case ["exit later"] if RANK:
            atexit.register(os._exit, 7)
        case ["hang later"] if RANK:
            atexit.register(time.sleep, 2 * launching.LIMIT_S)
    return 0


@pytest.fixture
def ranks(tmp_path):
    """Two ranks, which have run a job."""
    runner = Runner(2, tmp_path, module="test_runner")
    assert runner.run("nothing").code == 0
    yield runner
    runner.end()


@pytest.mark.parametrize(
    ("words", "code", "err"),
    [("codes 0 2", 2, ""), ("codes -9 3", -9, ""), ("exit", 0, ""), ("exit why", 1, "why\nwhy\n"), ("nothing", 0, "")],
)
def test_the_exit_code_is_that_of_a_process(ranks, words, code, err):
    outcome = ranks.run(*words.split())
    assert (outcome.code, outcome.err) == (code, err)


def test_ranks_that_hang_fail_one_job_and_are_ended(ranks, monkeypatch):
    process = ranks._process
    with monkeypatch.context() as short:
        short.setattr(launching, "LIMIT_S", 1.0)
        with pytest.raises(AssertionError, match="no end within"):
            ranks.run("hang")
    assert process.poll() is not None
    assert ranks.run("nothing").code == 0


def test_a_crash_after_the_last_job_fails(ranks):
    assert ranks.run("exit later").code == 0
    with pytest.raises(AssertionError, match="mpirun ended with 7"):
        ranks.end()
    assert ranks.run("nothing").code == 0


def test_a_crash_between_two_jobs_fails_the_second(ranks):
    ranks._process.terminate()
    ranks._process.wait(launching.LIMIT_S)
    with pytest.raises(AssertionError, match="mpirun ended with"):
        ranks.run("nothing")
    assert ranks.run("nothing").code == 0


def test_ranks_that_start_when_the_tests_are_over_end(tmp_path):
    """They have not opened their FIFOs yet when these are closed."""
    runner = Runner(2, tmp_path, module="test_runner")
    runner.start("nothing")
    process = runner._process
    runner.end()
    assert process.poll() is not None


def test_ranks_that_hang_after_the_last_job_are_ended(ranks, monkeypatch):
    assert ranks.run("hang later").code == 0
    process = ranks._process
    with monkeypatch.context() as short:
        short.setattr(launching, "LIMIT_S", 1.0)
        with pytest.raises(subprocess.TimeoutExpired):
            ranks.end()
    assert process.poll() is not None
    assert ranks.run("nothing").code == 0
