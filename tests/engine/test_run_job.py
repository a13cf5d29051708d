"""A whole job inside a program that goes on afterwards, as a benchmark does."""

import signal

from mpi4py import MPI

from engine.jobs import make_job
from engine.runs import SMALL
from moempi.engine.run import run_job
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.initialize import initialize
from moempi.storage.run_state import read_state


def test_after_a_finished_job_the_program_still_fails_and_is_still_interrupted(tmp_path):
    initialize(SMALL, tmp_path / "weights.h5", seed=1)
    (tmp_path / "prompts.jsonl").write_text('{"tokens": [1, 2, 3]}')
    job = make_job(tmp_path, exchange={"transport": "alltoallv"}, sampling={"max_tokens": 2, "ignore_eos": True})
    world, handler, calls = World(MPI.COMM_SELF), signal.getsignal(signal.SIGTERM), []
    usr1 = signal.getsignal(signal.SIGUSR1)
    try:
        for times in (1, 2):
            options = {"job_text": "", "world": world, "stop": Stop(), "strict": True}
            assert run_job(job, **options, on_finished=lambda: calls.append(read_state(job.output.results).state)) == 0
            assert calls == ["finished"] * times
            assert signal.getsignal(signal.SIGTERM) is handler
            assert world._on_failure("a later failure", 70) == 70
            assert read_state(job.output.results).state == "finished"
    finally:
        signal.signal(signal.SIGUSR1, usr1)
