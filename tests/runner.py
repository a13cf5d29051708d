"""Ranks that stay: one mpirun runs one command line of the program after another, beside the process of the tests."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import mpirun as launching

PROGRAM = Path(__file__).with_name("run_jobs.py")
STAY = os.environ.get("MOEMPI_TEST_DEVICE") != "cuda"
"""Whether ranks stay at all; on a GPU they would keep the memory of all runs before."""


class Runner:
    """`num_ranks` ranks, started for the first command line, and again for the one after each that fails.

    `module` has the program's `main`: "moempi.cli", or a module of the tests that changes the program.
    """

    def __init__(self, num_ranks: int, folder: Path, *, module: str = "moempi.cli", **environment: str) -> None:
        self._num_ranks = num_ranks
        self._folder = folder
        self._module = module
        self._environment = {"PYTHONPATH": str(launching.ROOT / "tests")} | environment
        self._starts = count()
        self._numbers = count()
        self._jobs: list[int] = []
        self._process: subprocess.Popen[str] | None = None

    def start(self, *words: str | Path) -> Callable[[], launching.Outcome]:
        """Hand a command line to the ranks; the value waits until all of them have ended it.

        Its exit code is the largest of the ranks' in magnitude, or mpirun's if the ranks end. Ranks past the limit are
        killed, which fails.
        """
        if self._process is not None and self._process.poll() is not None:
            self.end()
        if self._process is None:
            self._begin()
        begin, process, job = time.monotonic(), self._process, self._hand_over([str(word) for word in words])

        def outcome() -> launching.Outcome:
            codes = [job.with_suffix(f".{rank}") for rank in range(self._num_ranks)]
            limit = time.monotonic() + launching.LIMIT_S
            while process.poll() is None and not all(map(Path.exists, codes)):
                if time.monotonic() > limit:
                    self._process = None
                    self._close_jobs()
                    launching.end(process)
                    raise AssertionError(f"no end within {launching.LIMIT_S} s: {words}: {written(job)}")
                time.sleep(0.005)
            ended = [int(code.read_text()) for code in codes if code.exists()]
            code = max(ended, key=abs) if len(ended) == self._num_ranks else process.poll() or -1
            if (code or not STAY) and process is self._process:
                # A run that does not finish keeps the lock of its results until its process ends.
                self.end(failed=code != 0)
            return launching.Outcome(code, *written(job), time.monotonic() - begin)

        return outcome

    def run(self, *words: str | Path) -> launching.Outcome:
        """Run a command line of the program on the ranks and wait."""
        return self.start(*words)()

    def end(self, *, failed: bool = False) -> None:
        """End the ranks, if there are any; unless a job has failed, mpirun's exit code must be 0."""
        process, self._process = self._process, None
        if process is None:
            return
        self._close_jobs()
        try:
            code = process.wait(launching.LIMIT_S)
        finally:
            launching.end(process)
        assert failed or code == 0, f"mpirun ended with {code}: {(self._place / 'mpirun.err').read_text()}"

    def _begin(self) -> None:
        self._place, self._numbers = self._folder / str(next(self._starts)), count()
        self._place.mkdir()
        self._jobs = [open_fifo(self._place / f"{rank}.jobs") for rank in range(self._num_ranks)]
        program = launching.python(PROGRAM, self._module, self._place)
        command = (launching.LAUNCHER, "-n", str(self._num_ranks), *program)
        words = ("bash", "-c", 'exec "$@" &>"$0"', self._place / "mpirun.err", *command)
        self._process = launching.start(*words, **self._environment)

    def _hand_over(self, words: list[str]) -> Path:
        line = f"{json.dumps(words)}\n".encode()
        for job in self._jobs:
            os.write(job, line)
        return self._place / str(next(self._numbers))

    def _close_jobs(self) -> None:
        """The end of the FIFOs ends the ranks."""
        for job in self._jobs:
            os.close(job)
        self._jobs = []


def open_fifo(path: Path) -> int:
    """Make a FIFO and open both its ends: to open one waits for the other, and to write fails without a reader."""
    os.mkfifo(path)
    return os.open(path, os.O_RDWR)


def written(job: Path) -> tuple[str, str]:
    """What the ranks have written to stdout and to stderr."""
    places = (job.with_suffix(".out"), job.with_suffix(".err"))
    return tuple(place.read_text(errors="backslashreplace") if place.exists() else "" for place in places)
