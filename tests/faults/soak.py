"""The soak: python tests/faults/soak.py [KIND ...] [--minutes N]

Runs the real program on 4 ranks, a job of each kind ("generate") for N minutes (10). Watches it from outside: of each
rank its resident memory (Rss of /proc/PID/smaps_rollup), descriptors, threads and mapped shared memory, of the
run the bytes of its journals per finished token. Prints a table. After the first minute of a run, or the first quarter
of a shorter one, resident memory may grow by 2 MB (1 MB in a run of a minute), bytes per token may change by 5 % (and
by the share of tokens whose requests are not finished), and nothing else may grow, of descriptors and threads the least
of the first and of the second half; else the exit code is 1.
"""

import argparse
import itertools
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mpirun as launching
from faults.rehearsal import BrokenError, require
from moempi.storage.convert import convert
from moempi.storage.journal import journal_path
from moempi.storage.run_state import state_path

RANKS = 4
WARM_UP_S = 60.0
GROWTH_BYTES, GROWTH_BYTES_PER_MINUTE = 2_000_000, 1_000_000
JOURNAL_CHANGE = 0.05
PROMPTS_PER_MINUTE = 3_000
"""Few, because the memory of computed prompts is used again, which hides growth; fast ranks finish early."""
KINDS = {
    "generate": {"exchange.transport": "shared"},
    "stages": {"exchange.transport": "pairwise", "exchange.immediate": "true", "parallel.stages": "2"},
    "balance": {"exchange.transport": "alltoallv", "balance.mode": "bias", "parallel.tensor": "2"},
    "score": {"exchange.transport": "shared", "task": "score", "score.top_n": "3"},
}
SEQUENCES = 16
MAX_TOKENS = 60
PROMPTS = (
    {},
    {"max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 1.0, "repetition_penalty": 1.2},
    {"max_tokens": MAX_TOKENS, "ignore_eos": True, "temperature": 1.0, "stop": ["99", "="]},
    {"max_tokens": MAX_TOKENS, "ignore_eos": True, "top_logprobs": 5},
    {"prompt": "1+1=" * 40},  # refused: longer than the model's positions
    {"max_tokens": 0},  # refused: a bad line
)
WEIGHTS = (2, 4, 2, 6, 1, 1)
QUESTIONS = 4


@dataclass(frozen=True)
class Sample:
    """One look at a run: bytes and numbers of each rank, then tokens and bytes of the whole run."""

    seconds: float
    resident: Sequence[int]
    descriptors: Sequence[int]
    threads: Sequence[int]
    shared: Sequence[int]
    tokens: int
    journals: int


def run(kinds: Sequence[str], *, minutes: float, folder: Path) -> list[str]:
    """Soak a job of each kind for `minutes`; print tables, and return what grew."""
    seconds = 60 * minutes
    convert(launching.ROOT / "weights/abacus", folder / "weights.h5")
    write_prompts(folder / "prompts.jsonl", int(PROMPTS_PER_MINUTE * minutes))
    grown = []
    for kind in kinds:
        try:
            samples = soak(folder, kind, seconds=seconds)
            print(table(kind, samples), flush=True)
            growth_bytes = min(GROWTH_BYTES, round(GROWTH_BYTES_PER_MINUTE * minutes))
            found = growth(samples, warm_up_s=min(WARM_UP_S, seconds / 4), growth_bytes=growth_bytes)
            grown += [f"{kind}: {what}" for what in found]
        except BrokenError as broken:
            grown.append(f"{kind}: {broken}")
    return grown


def write_prompts(path: Path, count: int) -> None:
    """Several questions each, and the keys of one of PROMPTS: all kinds of requests, in no order."""
    lines = (launching.ROOT / "jobs/abacus.jsonl").read_text().splitlines()
    questions = [json.loads(line)["prompt"] for line in lines]
    dice = random.Random(0)
    with path.open("w") as file:
        for kind in dice.choices(PROMPTS, WEIGHTS, k=count):
            prompt = {"prompt": "".join(dice.choices(questions, k=QUESTIONS)), "reference": "42"}
            file.write(json.dumps(prompt | kind) + "\n")


def soak(folder: Path, kind: str, *, seconds: float) -> list[Sample]:
    """Run a job of a kind for some time, and look at it each time that it writes its state."""
    results = folder / f"{kind}.h5"
    settings = {
        "model.weights": str(folder / "weights.h5"),
        "input.prompts": str(folder / "prompts.jsonl"),
        "output.results": str(results),
        "run.precision": "float32",
        "run.max_sequences": str(SEQUENCES),
        "trace.routing": "true",
    } | KINDS[kind]
    sets = itertools.chain.from_iterable(("--set", f"{key}={value}") for key, value in settings.items())
    program = launching.python("-m", "moempi", "run", "jobs/abacus.toml", *sets, "--max-minutes", f"{seconds / 60}")
    process = launching.start("mpirun", "-n", str(RANKS), *program)
    try:
        samples = list(watch(process, results))
        _, err = process.communicate(timeout=launching.LIMIT_S)
    finally:
        launching.end(process)
    require(process.returncode in (75, 0), f"exit code {process.returncode}: {err}")
    return samples


def watch(process: "subprocess.Popen[str]", results: Path) -> Iterator[Sample]:
    """Yield a sample each time that the run writes the number of its tokens, until it ends."""
    state, tokens, begin = state_path(results), 0, 0.0
    while process.poll() is None:
        time.sleep(0.05)
        found = json.loads(state.read_text()) if state.exists() else {"state": "running", "tokens": 0}
        if found["state"] != "running":
            return
        if found["tokens"] > tokens:
            begin, tokens = begin or time.monotonic(), found["tokens"]
            try:
                yield sample_of(time.monotonic() - begin, results, tokens)
            except (BrokenError, OSError):
                process.wait(launching.LIMIT_S)  # it was about to end
                require(json.loads(state.read_text())["state"] != "running", "a rank is gone in the middle of the run")


def sample_of(seconds: float, results: Path, tokens: int) -> Sample:
    journals = [journal_path(results, rank) for rank in range(RANKS)]
    writers = [writer_of(journal) for journal in journals]
    return Sample(
        seconds,
        resident=[resident_bytes(process) for process in writers],
        descriptors=[len(list((process / "fd").iterdir())) for process in writers],
        threads=[len(list((process / "task").iterdir())) for process in writers],
        shared=[shared_bytes(process) for process in writers],
        tokens=tokens,
        journals=sum(journal.stat().st_size for journal in journals),
    )


def writer_of(journal: Path) -> Path:
    """The process that has opened a journal: the rank."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(opened.readlink() == journal for opened in (process / "fd").iterdir()):
                return process
        except OSError:  # it has ended
            continue
    raise BrokenError(f"no process writes {journal}")


def resident_bytes(process: Path) -> int:
    (kilobytes,) = re.findall(r"^Rss: *(\d+) kB", (process / "smaps_rollup").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


def shared_bytes(process: Path) -> int:
    """Bytes of /dev/shm that a process has mapped, under a name or not."""
    ranges = [line.split()[0].split("-") for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line]
    return sum(int(end, 16) - int(first, 16) for first, end in ranges)


def growth(samples: Sequence[Sample], *, warm_up_s: float, growth_bytes: int) -> list[str]:
    """What grew after the warm-up, resident memory by more than `growth_bytes`, and by how much."""
    measured = [sample for sample in samples if sample.seconds >= warm_up_s]
    require(len(measured) >= 3, f"{len(samples)} samples, {len(measured)} after {warm_up_s:.0f} s, are too few")
    first, half, grown = measured[0], len(measured) // 2, []
    for rank in range(RANKS):
        for name, limit in (("resident", growth_bytes), ("shared", 0)):
            most = max(getattr(sample, name)[rank] for sample in measured)
            added = most - getattr(first, name)[rank]
            if added > limit:
                grown.append(f"{name} of rank {rank} grew by {added:,} to {most:,}")
        for name in ("descriptors", "threads"):  # the least, because a thread that syncs a file ends soon
            early, late = (min(getattr(one, name)[rank] for one in part) for part in (measured[:half], measured[half:]))
            if late > early:
                grown.append(f"{name} of rank {rank} grew by {late - early:,} to {late:,}")
    middle, last = measured[half], measured[-1]
    early, late = per_token(first, middle), per_token(middle, last)
    unfinished = RANKS * SEQUENCES * MAX_TOKENS / (last.tokens - middle.tokens)  # their routing is recorded already
    if abs(late / early - 1) > JOURNAL_CHANGE + unfinished:
        grown.append(f"journal bytes per token changed from {early:.1f} to {late:.1f}")
    return grown


def per_token(first: Sample, last: Sample) -> float:
    return (last.journals - first.journals) / max(last.tokens - first.tokens, 1)


def table(kind: str, samples: Sequence[Sample]) -> str:
    """A row for each sample; of the ranks the fullest."""
    rows = [f"{kind:<9} {'resident MB of each rank':>31}  fds threads  shm MB    tokens  B/token"]
    for before, sample in itertools.pairwise([samples[0], *samples]):
        resident = " ".join(f"{num_bytes / 1e6:7.2f}" for num_bytes in sample.resident)
        rows.append(
            f"{sample.seconds:7.0f} s {resident} {max(sample.descriptors):4} {max(sample.threads):7} "
            f"{max(sample.shared) / 1e6:7.2f} {sample.tokens:9,} {per_token(before, sample):8.1f}"
        )
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["generate"], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of each kind (10)")
    chosen = parser.parse_args()
    unknown = set(chosen.kinds) - set(KINDS)
    if unknown:
        parser.error(f"unknown kind {unknown.pop()}; choose from {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="moempi-soak.") as folder:
        grown = run(chosen.kinds, minutes=chosen.minutes, folder=Path(folder))
    print("\n".join(grown or ["nothing grew"]))
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
