"""The fault campaign:

    python tests/faults/campaign.py [--seed N] [--kills N] [--endings N] [--flips N] [--every N] [--soak MINUTES]

Disturbs the real program in every way below. Each time the program must end soon, with a non-zero exit code and one
line that names the cause, and leave nothing behind; and a second run must give the results of an undisturbed run, each
request once. Prints a table: fault, tried, passed. Seeded; `--every 5` tries every fifth case.

A kill at a random time may come after the end of the run. Such kills are counted in a separate row, not as passed.
A soak follows: see soak.py.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mpirun as launching
from faults import damaging, ending, merging, scoring, soak
from faults.inject_fault import FAULTS, POINTS, RELEASE
from faults.rehearsal import BrokenError, Rehearsal, UnreportedError, is_alive, require, wait_for

Case = tuple[str, Callable[[], object]]

NO_TRACE = {"trace.routing": "false", "trace.hidden": "[]"}
KILL = "SIGKILL at any time"
AFTER_END = "SIGKILL after the end"
RANKS = 3


class AfterEndError(Exception):
    """A kill after the end of the run."""


def injected_cases(rehearsal: Rehearsal) -> Iterator[Case]:
    """Each fault at each point, on the first rank and the last."""
    for fault in FAULTS:
        for point in ("prompts", "weights", *POINTS, "append", "merge"):
            for rank in (0,) if point in ("prompts", "merge") else (0, RANKS - 1):
                yield fault, lambda fault=fault, point=point, rank=rank: inject(rehearsal, fault, point, rank)


def inject(rehearsal: Rehearsal, fault: str, point: str, rank: int) -> None:
    results = rehearsal.fresh()
    count = 1 if point in ("prompts", "weights", "merge") else 10
    process = rehearsal.start(results, fault, rank=rank, point=point, count=count, num_ranks=RANKS)
    line = rehearsal.require_clean_end(process, results, injected_at=None)
    require(f"rank {rank}" in line, f"{fault} at {point} on rank {rank} is reported as: {line}")
    rehearsal.finish(results, num_ranks=2)


def kill_cases(rehearsal: Rehearsal, dice: random.Random, kills: int) -> Iterator[Case]:
    """SIGKILL to one rank at a random time between its start and the end of the run."""
    for _ in range(kills):
        rank, ranks, delay = dice.randrange(RANKS), dice.choice((1, 2, 4)), dice.random()
        yield KILL, lambda rank=rank, ranks=ranks, delay=delay: kill(rehearsal, rank, ranks, delay)


def kill(rehearsal: Rehearsal, rank: int, ranks_after: int, delay: float) -> None:
    results = rehearsal.fresh()
    process = rehearsal.start(results, "none", num_ranks=RANKS)
    note = results.parent / "notes" / f"{rank}.pid"
    wait_for(note, process)
    time.sleep(delay * rehearsal.seconds)
    if process.poll() is not None or not is_alive(int(note.read_text())):
        launching.end(process)
        shutil.rmtree(note.parent)
        rehearsal.finish(results, num_ranks=ranks_after)
        raise AfterEndError
    with suppress(ProcessLookupError):
        os.kill(int(note.read_text()), signal.SIGKILL)
    try:
        rehearsal.require_clean_end(process, results, injected_at=time.time())
    except UnreportedError:
        if not results.exists():
            raise
        rehearsal.finish(results, num_ranks=ranks_after)
        raise AfterEndError from None
    rehearsal.finish(results, num_ranks=ranks_after)


def disk_cases(rehearsal: Rehearsal) -> Iterator[Case]:
    """A disk of 4 MB with no free space, with space for a few records, and for all records but not the results.

    Nothing but requests is recorded; a disk without space for what is recorded of all tokens is refused beforehand.
    """
    for name, free_bytes in (("create", 0), ("append", 24 << 10), ("merge", 72 << 10)):
        yield f"full disk at {name}", lambda free_bytes=free_bytes: fill_disk(rehearsal, free_bytes, **NO_TRACE)
    yield "small disk", lambda: fill_disk(rehearsal, 24 << 10, words="record less")
    yield "read-only disk", lambda: read_only_disk(rehearsal)


@contextmanager
def small_disk(rehearsal: Rehearsal) -> Iterator[Path]:
    results = rehearsal.fresh()
    disk = results.parent / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    try:
        yield disk / "r.h5"
    finally:
        subprocess.run(["umount", disk], check=True)


def fill_disk(rehearsal: Rehearsal, free_bytes: int, words: str = "cannot be", **settings: str) -> None:
    with small_disk(rehearsal) as results:
        ballast = results.parent / "ballast"
        num_bytes = shutil.disk_usage(results.parent).free - free_bytes
        with ballast.open("wb") as file:
            file.write(bytes(num_bytes))
        require_refusal(rehearsal, results, words=words, **settings)
        ballast.unlink()
        rehearsal.finish(results, num_ranks=2, compare=False, **settings)
        rehearsal.require_equal_outputs(results)


def read_only_disk(rehearsal: Rehearsal) -> None:
    with small_disk(rehearsal) as results:
        subprocess.run(["mount", "-o", "remount,ro", results.parent], check=True)
        require_refusal(rehearsal, results)


def folder_cases(rehearsal: Rehearsal) -> Iterator[Case]:
    """Results in a folder that cannot be used, does not exist, or is in use."""

    def below_a_file() -> None:
        results = rehearsal.fresh()
        (results.parent / "file").touch()
        require_refusal(rehearsal, results.parent / "file" / "r.h5")

    def missing() -> None:
        results = rehearsal.fresh().parent / "a" / "b" / "r.h5"
        rehearsal.finish(results, num_ranks=2)

    def in_use() -> None:
        results = rehearsal.fresh()
        notes = results.parent / "notes"
        first = rehearsal.start(results, "hold", rank=0, num_ranks=2, timeout_s=2 * launching.LIMIT_S)
        try:
            wait_for(notes / "0.injected", first)
            require_refusal(rehearsal, results, words="another run writes it")
        finally:
            (notes / RELEASE).touch()
            _, err = first.communicate(timeout=launching.LIMIT_S)
        require(first.returncode == 0, f"the first run is disturbed: {err}")
        shutil.rmtree(notes)
        rehearsal.require_same(results)

    yield "folder that is a file", below_a_file
    yield "missing folder", missing
    yield "two runs on one output", in_use


def require_refusal(rehearsal: Rehearsal, results: Path, *, words: str = "cannot be", **settings: str) -> None:
    """Exit code 74 and one line, whatever the ranks."""
    outcome = launching.mpirun(RANKS, *launching.python("-m", "moempi", *rehearsal.command(results, **settings)))
    lines = [line for line in outcome.lines if "requests, " not in line]
    require(outcome.code == 74, f"exit code {outcome.code}: {outcome.err}")
    require(len(lines) == 1 and words in lines[0], f"{lines}")


def launcher_cases() -> Iterator[Case]:
    """Single processes in the environment of a launcher of another MPI."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
        yield "wrong launcher", lambda name=name: launch_wrongly(name)


def launch_wrongly(name: str) -> None:
    outcome = launching.execute(*launching.python("-m", "moempi", "check"), **{name: "4"})
    require((outcome.code, len(outcome.lines)) == (64, 1), f"exit code {outcome.code}: {outcome.err}")


def cases(rehearsal: Rehearsal, dice: random.Random, *, kills: int, endings: int, flips: int) -> Iterator[Case]:
    yield from injected_cases(rehearsal)
    yield from kill_cases(rehearsal, dice, kills)
    if os.geteuid() == 0:
        yield from disk_cases(rehearsal)
    yield from folder_cases(rehearsal)
    yield from launcher_cases()
    yield from merging.cases(rehearsal.folder)
    yield from ending.cases(rehearsal, dice, endings)
    yield from damaging.cases(rehearsal, dice, flips)
    yield from scoring.cases(rehearsal.folder, dice, kills)


def run(
    *, seed: int, kills: int, endings: int, flips: int, every: int, folder: Path
) -> tuple[Counter[str], Counter[str]]:
    """Counts of cases tried and passed per fault; prints failures on stderr."""
    tried: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    dice = random.Random(seed)
    all_cases = cases(Rehearsal(folder), dice, kills=kills, endings=endings, flips=flips)
    for number, (name, check) in enumerate(all_cases):
        if (number + seed) % every and tried[name]:
            continue
        tried[name] += 1
        try:
            check()
            passed[name] += 1
        except AfterEndError:
            tried[name] -= 1
            tried[AFTER_END] += 1
        except (BrokenError, AssertionError) as broken:
            print(f"{name}, case {number}: {broken}", file=sys.stderr, flush=True)
    return tried, passed


def table(tried: Counter[str], passed: Counter[str]) -> str:
    rows = [f"{'fault':<28} {'tried':>5} {'passed':>6}"]
    rows += [f"{name:<28} {tried[name]:>5} {passed[name]:>6}" for name in tried]
    return "\n".join([*rows, f"{'all':<28} {tried.total():>5} {passed.total():>6}"])


def all_passed(tried: Counter[str], passed: Counter[str]) -> bool:
    """Whether all cases passed, except for kills after the end."""
    return all(passed[name] == tried[name] for name in tried if name != AFTER_END)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=60, help="kills at random times (60)")
    parser.add_argument("--endings", type=int, default=50, help="signals between the last token and the end (50)")
    parser.add_argument("--flips", type=int, default=50, help="bits flipped in journals (50)")
    parser.add_argument("--every", type=int, default=1, help="try each N-th case, and each fault at least once")
    parser.add_argument("--soak", type=float, default=10.0, metavar="MINUTES", help="length of the soak (10); 0: none")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moempi-faults.") as folder:
        tried, passed = run(
            seed=chosen.seed,
            kills=chosen.kills,
            endings=chosen.endings,
            flips=chosen.flips,
            every=chosen.every,
            folder=Path(folder),
        )
    print(table(tried, passed), flush=True)
    with tempfile.TemporaryDirectory(prefix="moempi-soak.") as folder:
        grown = soak.run(["generate"], minutes=chosen.soak, folder=Path(folder)) if chosen.soak else []
    print("\n".join(grown))
    return int(bool(grown) or not all_passed(tried, passed))


if __name__ == "__main__":
    sys.exit(main())
