"""A job that the campaign disturbs: its runs, and the requirements on each run, however it ended."""

import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import h5py
import numpy as np

import mpirun as launching
from moempi.storage.convert import convert

PROGRAM = Path(__file__).with_name("inject_fault.py")
END_S = 40.0  # ten seconds, and what a busy machine adds
TIMEOUT_S = 6.0  # a busy machine may pause for three
NO_SETTINGS: Mapping[str, str] = MappingProxyType({})
PROGRESS = re.compile(r"moempi: (\d+/\d+ requests|loading weights|.*: \d+ requests), ")


class BrokenError(Exception):
    """A requirement on a run is not met."""


class UnreportedError(BrokenError):
    """A run ends soon and leaves nothing behind, but with exit code 0 or without an error line."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenError(what)


class Rehearsal:
    """A job of `num_prompts` prompts in float32, and the results of an undisturbed run for comparison.

    All its runs have these `settings`.
    """

    def __init__(self, folder: Path, *, num_prompts: int = 96, settings: Mapping[str, str] = NO_SETTINGS) -> None:
        self.settings = settings
        self.folder = folder
        self.num_prompts = num_prompts
        self._numbers = itertools.count()
        lines = [json.loads(line) for line in (launching.ROOT / "jobs/abacus.jsonl").read_text().splitlines()]
        self.prompts = folder / "prompts.jsonl"
        with self.prompts.open("w") as file:
            for number in range(num_prompts):
                file.write(json.dumps(lines[number % len(lines)] | {"id": f"../../x{number}"}) + "\n")
        self.weights = folder / "weights.h5"
        convert(launching.ROOT / "weights/abacus", self.weights)
        self.reference = folder / "reference.h5"
        begin = time.monotonic()
        self.finish(self.reference, num_ranks=2, compare=False)
        self.seconds = time.monotonic() - begin

    def fresh(self) -> Path:
        """The path of a new results file, in a folder of its own."""
        folder = self.folder / str(next(self._numbers))
        folder.mkdir()
        return folder / "r.h5"

    def command(self, results: Path, *, timeout_s: float = TIMEOUT_S, **settings: str) -> list[str]:
        settings = {
            "model.weights": str(self.weights),
            "input.prompts": str(self.prompts),
            "output.results": str(results),
            "run.precision": "float32",
            "run.timeout_s": str(timeout_s),
            "exchange.transport": "alltoallv",
            "trace.routing": "weights",
            "trace.hidden": "[0,5]",
            **self.settings,
        } | settings
        return ["run", "jobs/abacus.toml", *(word for item in settings.items() for word in ("--set", "=".join(item)))]

    def start(
        self,
        results: Path,
        fault: str,
        *,
        rank: int = -1,
        point: str = "agree",
        count: int = 1,
        num_ranks: int,
        timeout_s: float = TIMEOUT_S,
        **settings: str,
    ) -> "subprocess.Popen[str]":
        """Start a run with a fault at the `count`-th time that `rank` reaches `point`."""
        (results.parent / "tmp").mkdir(exist_ok=True)
        (results.parent / "notes").mkdir(exist_ok=True)
        command = [PROGRAM, results.parent / "notes", fault, str(rank), point, str(count)]
        command += self.command(results, timeout_s=timeout_s, **settings)
        environment = {"TMPDIR": str(results.parent / "tmp"), "PYTHONUNBUFFERED": "1"}
        return launching.start("mpirun", "-n", str(num_ranks), *launching.python(*command), **environment)

    def require_clean_end(self, process: "subprocess.Popen[str]", results: Path, *, injected_at: float | None) -> str:
        """Require that the run ends soon, with one error line, and leaves nothing behind; returns the line."""
        try:
            _, err = process.communicate(timeout=2 * END_S)
        except subprocess.TimeoutExpired:
            launching.end(process)
            raise BrokenError("does not end") from None
        lines = [line for line in err.splitlines() if line.startswith("moempi: ") and not PROGRESS.match(line)]
        notes = results.parent / "notes"
        begin = injected_at or min((float(note.read_text()) for note in notes.glob("*.injected")), default=time.time())
        while alive := [note.stem for note in notes.glob("*.pid") if is_alive(int(note.read_text()))]:
            require(time.time() < begin + END_S, f"ranks {alive} live on")
            time.sleep(0.05)
        require(time.time() < begin + END_S, f"took {time.time() - begin:.1f} s")
        require(not list((results.parent / "tmp").rglob("*")), "leaves temporary files")
        left = [name for note in notes.glob("*.shm") for name in note.read_text().split() if Path(name).exists()]
        require(not left, f"leaves {left}")
        shutil.rmtree(notes)
        if process.returncode == 0 or not lines:
            raise UnreportedError(f"exit code {process.returncode}, {len(lines)} lines: {lines}")
        require(len(lines) == 1, f"{len(lines)} lines: {lines}")
        return lines[0]

    def launch(self, results: Path, *, num_ranks: int, **settings: str) -> launching.Outcome:
        """Run the remaining requests on `num_ranks` ranks."""
        command = self.command(results, timeout_s=launching.LIMIT_S, **settings)
        return launching.mpirun(num_ranks, *launching.python("-m", "moempi", *command))

    def finish(self, results: Path, *, num_ranks: int, compare: bool = True, **settings: str) -> launching.Outcome:
        """Launch, require that the run succeeds, and compare with the undisturbed results."""
        outcome = self.launch(results, num_ranks=num_ranks, **settings)
        require(outcome.code == 0, f"does not finish: {outcome.lines}")
        if compare:
            self.require_same(results)
        return outcome

    def require_same(self, results: Path) -> None:
        """Require the undisturbed results, and nothing left beside them."""
        self.require_equal(results)
        left = {entry.name for entry in results.parent.iterdir()} - {"r.h5", "r.h5.logs", "r.h5.run.json", "tmp"}
        require(not left, f"leaves {left}")

    def require_equal(self, results: Path) -> None:
        """Require the undisturbed results, and every recorded value of each position once."""
        for (name, expected), found in zip(
            recorded_of(self.reference).items(), recorded_of(results).values(), strict=True
        ):
            require(np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f"), f"differs in {name}")
        self.require_equal_outputs(results)

    def require_equal_outputs(self, results: Path) -> None:
        """Require the undisturbed tokens and log-probabilities."""
        compared = launching.execute(*launching.python("-m", "moempi", "compare", self.reference, results))
        same = f"{self.num_prompts} requests, 0 differ in tokens; log-probabilities within 0\n"
        require(compared.out == same, f"differs: {compared.out}{compared.err}")


def recorded_of(results: Path) -> dict[str, np.ndarray]:
    """All recorded values of a results file that are equal in any layout."""
    with h5py.File(results) as file:
        named = ("routing", "hidden", "hidden/values", "score", "score/above", "statistics")
        tables = [file[name] for name in named if name in file]
        datasets = {item.name: item for table in tables for item in table.values() if isinstance(item, h5py.Dataset)}
        return {name: item[:] for name, item in datasets.items() if name.split("/")[-1] not in ("rank", "row", "step")}


def wait_for(note: Path, process: "subprocess.Popen[str]") -> None:
    """Wait until a run has written a note; raises BrokenError if it ends before."""
    while not note.exists() or not note.read_text():
        require(process.poll() is None, f"ends before it writes {note.name}")
        time.sleep(0.001)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
