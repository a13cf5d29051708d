"""Jobs of tests/cluster, submitted with jobs/moempi.sbatch to the Slurm of the virtual hosts."""

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster import hosts
from moempi.errors import MoempiError
from moempi.storage.run_state import RunState, read_state
from mpirun import ROOT

END_S = 300.0  # only what hangs takes longer, also on a busy machine
OVER = ("COMPLETING", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
LINE = re.compile(r"^moempi: ranks? \d.*$", re.MULTILINE)


def facts(job: str) -> dict[str, str]:
    """What Slurm says of a job, as soon as its controller answers."""
    command = ["scontrol", "show", "--oneliner", "job", job]
    limit = time.monotonic() + END_S
    while (ran := subprocess.run(command, text=True, capture_output=True, check=False)).returncode:
        assert time.monotonic() < limit, ran.stderr
        time.sleep(0.1)
    return dict(word.partition("=")[::2] for word in ran.stdout.split())


def wait_for(true_at_last: Callable[[], bool], *, what: str) -> None:
    limit = time.monotonic() + END_S
    while not true_at_last():
        assert time.monotonic() < limit, f"not within {END_S} s: {what}"
        time.sleep(0.05)


class Job:
    """A job file with settings of its own, whose results, log and state are in a folder of the shared file system."""

    def __init__(self, folder: Path, **settings: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.results = folder / "r.h5"
        self.log = folder / "log"
        self.settings = {"output.results": self.results} | {
            key.replace("__", "."): value for key, value in settings.items()
        }
        self.number = ""
        self.writers: set[str] = set()
        """The hosts whose ranks have written the state, as seen while records or the job's end were awaited."""
        self.numbers_of_ranks: set[int] = set()
        """The numbers of ranks in the state, as seen at the same times."""

    def submit(self, *options: str, launcher: str = "srun", per_host: int = 2, **environment: str) -> None:
        where = ["--nodes=4", f"--ntasks-per-node={per_host}", "--time=5", f"--output={self.log}", *options]
        settings = [word for key, value in self.settings.items() for word in ("--set", f"{key}={value}")]
        command = ["sbatch", "--parsable", *where, ROOT / "jobs/moempi.sbatch", ROOT / "jobs/abacus.toml", *settings]
        variables = os.environ | {"MOEMPI_LAUNCHER": launcher} | environment
        ran = subprocess.run(
            [str(word) for word in command], cwd=self.folder, env=variables, text=True, capture_output=True, check=True
        )
        self.number = ran.stdout.strip()

    def run(self, *options: str, **environment: str) -> None:
        """Submit it, and wait until it has finished well."""
        self.submit(*options, **environment)
        assert self.wait_for_end() == "COMPLETED", self.said()
        state = self.state()
        assert state is not None
        assert state.state == "finished", self.said()

    def wait_for_end(self) -> str:
        """How Slurm says that its script ended; a host that is lost may be busy with it for longer."""

        def is_over() -> bool:
            self._note_state()
            return facts(self.number)["JobState"] in OVER

        wait_for(is_over, what=f"the end: {self.said()}")
        found = facts(self.number)
        if found["JobState"] == "COMPLETING":
            return "COMPLETED" if found["ExitCode"] == "0:0" else "FAILED"
        return found["JobState"]

    def wait_for_records(self) -> None:
        """Until the ranks have put requests to disk."""

        def num_bytes() -> int:
            self._note_state()
            total = 0
            with suppress(FileNotFoundError):  # of files that a run removes meanwhile
                for part in Path(f"{self.results}.parts").rglob("rank-*.part"):
                    total += part.stat().st_size
            return total

        wait_for(lambda: num_bytes() > 4000, what=f"records: {self.said()}")

    def _note_state(self) -> None:
        if (state := self.state()) is not None:
            self.writers.add(state.host)
            self.numbers_of_ranks.add(state.world_size)

    def state(self) -> RunState | None:
        try:
            return read_state(self.results)
        except MoempiError:
            return None

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def lines(self) -> list[str]:
        """The lines in which ranks say why they end."""
        return LINE.findall(self.said())

    def compare(self, other: "Job", *, within: float = 0.0) -> str:
        return hosts.run("moempi", "compare", other.results, self.results, "--within", within).strip()


def write_prompts(path: Path, *, num: int, tokens: int, vocabulary: int, seed: int = 1) -> None:
    """Prompts of random tokens."""
    import random

    dice = random.Random(seed)
    with path.open("w") as file:
        for number in range(num):
            prompt = [dice.randrange(vocabulary) for _ in range(tokens)]
            file.write(json.dumps({"id": f"r{number}", "tokens": prompt}) + "\n")
