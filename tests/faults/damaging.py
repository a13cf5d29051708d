"""Journals of a run that was stopped midway, damaged in every way; and the run that goes on from them.

The run is stopped by a signal to itself when it appends a given record, so that requests are left on a machine of any
speed. Which requests a damage loses follows from the bytes alone: a record is lost if no file has its bytes any more.
"""

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import mpirun as launching
from faults.rehearsal import Rehearsal, require
from moempi.storage.journal import JournalReader, JournalWriter, journal_path, journal_paths, journals_folder
from moempi.storage.records import RankRecord, Record, RequestRecord, TraceRecord
from mpirun import Outcome

PAGE_BYTES = 4096
STOP_AT_APPEND = 2 * 60
SETTINGS = {"trace.routing": "true", "run.max_sequences": "8", "run.timeout_s": "60"}
LENGTH, CHECKSUM, FRAME_BYTES = slice(0, 8), slice(8, 16), 16
EARLIER = re.compile(r"of earlier runs\W+([0-9,]+) requests")


@dataclass(frozen=True)
class Span:
    """A record of the journal of `rank`, and the range of its bytes, of which the first 16 are its frame."""

    rank: int
    record: Record
    start: int
    end: int


class StoppedRun:
    """A run on two ranks that was stopped midway: its journals, and the results and routing of an undisturbed run."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self.rehearsal = rehearsal
        results = rehearsal.fresh()
        process = rehearsal.start(
            results, "SIGUSR1", rank=0, point="append", count=STOP_AT_APPEND, num_ranks=2, **SETTINGS
        )
        _, err = process.communicate(timeout=launching.LIMIT_S)
        require(process.returncode == 75, f"is not stopped: {err}")
        self.folder = journals_folder(results)
        self.whole = [path.read_bytes() for path in journal_paths(results)]
        self.spans = [span for rank, path in enumerate(journal_paths(results)) for span in spans_of(rank, path)]
        finished = sum(isinstance(span.record, RequestRecord) for span in self.spans)
        require(8 < finished < rehearsal.num_prompts - 8, f"{finished} requests are finished")

    def copy(self) -> Path:
        """The path of a new results file, beside which these journals lie."""
        results = self.rehearsal.fresh()
        shutil.copytree(self.folder, journals_folder(results))
        return results

    def of_kind(self, *kinds: type[Record]) -> list[Span]:
        return [span for span in self.spans if isinstance(span.record, kinds)]

    def is_kept(self, span: Span, journals: Sequence[bytes]) -> bool:
        frame = self.whole[span.rank][span.start : span.end]
        return any(frame in journal for journal in journals)

    def go_on(self, results: Path) -> Outcome:
        """Run to the end; require that exactly the requests without a loss are kept, and equal results."""
        journals = [path.read_bytes() for path in journal_paths(results)]
        lost = [span.record for span in self.spans if not self.is_kept(span, journals)]
        kept = {span.record.index for span in self.of_kind(RequestRecord) if self.is_kept(span, journals)}
        for record in lost:
            kept -= set(record.requests.tolist()) if isinstance(record, TraceRecord) else set()
        outcome = self.rehearsal.finish(results, num_ranks=3, **SETTINGS)
        found = EARLIER.search(outcome.out)
        num_kept = int(found[1].replace(",", "")) if found else 0
        require(num_kept == len(kept), f"{num_kept} requests are kept, not {len(kept)}")
        return outcome

    def go_on_after_refusal(self, results: Path, path: Path, *, words: str) -> None:
        """Require exit code 74 and one line with `words`; then move the journal out, as the line says, and go on."""
        refused = self.rehearsal.launch(results, num_ranks=2, **SETTINGS)
        require(refused.code == 74, f"exit code {refused.code}: {refused.err}")
        lines = [line for line in refused.lines if "requests, " not in line]
        require(len(lines) == 1 and str(path) in lines[0] and words in lines[0], f"{lines}")
        path.rename(results.parent / "tmp")
        require_silence(self.go_on(results))


def spans_of(rank: int, path: Path) -> list[Span]:
    with JournalReader(path) as journal:
        found = list(journal.records())
    ends = [*(offset for offset, _ in found[1:]), path.stat().st_size]
    return [Span(rank, record, offset, end) for (offset, record), end in zip(found, ends, strict=True)]


def require_silence(outcome: Outcome) -> None:
    warnings = [line for line in outcome.lines if ".part" in line]
    require(not warnings, f"warns: {warnings}")


def require_warning(outcome: Outcome, path: Path, offset: int) -> None:
    """Require one warning, which names the file and the byte."""
    warnings = [line for line in outcome.lines if ".part" in line]
    require(len(warnings) == 1, f"{len(warnings)} warnings: {warnings}")
    require(f"{path} " in warnings[0] and re.search(rf"byte {offset}\b", warnings[0]), f"not byte {offset}: {warnings}")


def flip(path: Path, bit: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


def flip_in_header(stopped: StoppedRun, dice: random.Random) -> None:
    results = stopped.copy()
    path = dice.choice(journal_paths(results))
    flip(path, dice.randrange(8 * stopped.spans[0].start))
    stopped.go_on_after_refusal(results, path, words=JournalReader.REMEDY)


def flip_in_record(stopped: StoppedRun, dice: random.Random, part: slice, *kinds: type[Record]) -> None:
    results = stopped.copy()
    span = dice.choice(stopped.of_kind(*kinds))
    path = journal_path(results, span.rank)
    flip(path, 8 * dice.choice(range(span.start, span.end)[part]) + dice.randrange(8))
    require_warning(stopped.go_on(results), path, span.start)


def tear(stopped: StoppedRun, dice: random.Random) -> None:
    """A cut between two records leaves no trace: the last byte of a record is never the last that is kept."""
    results = stopped.copy()
    span = dice.choice(stopped.spans)
    path = journal_path(results, span.rank)
    os.truncate(path, dice.randrange(span.start + 1, span.end))
    require_warning(stopped.go_on(results), path, span.start)


def tear_header(stopped: StoppedRun, dice: random.Random) -> None:
    results = stopped.copy()
    path = dice.choice(journal_paths(results))
    os.truncate(path, dice.randrange(stopped.spans[0].start))
    stopped.go_on_after_refusal(results, path, words=JournalReader.REMEDY)


def zero_page(stopped: StoppedRun, dice: random.Random, *, at_end: bool) -> None:
    """A page of zeros in the place of bytes, at a multiple of its size, or behind the last record."""
    results = stopped.copy()
    rank = dice.randrange(2)
    path, whole = journal_path(results, rank), stopped.whole[rank]
    page = len(whole) if at_end else PAGE_BYTES * dice.randrange(1, len(whole) // PAGE_BYTES)
    path.write_bytes(whole[:page] + bytes(PAGE_BYTES) + whole[page + PAGE_BYTES :])
    starts = [span.start for span in stopped.spans if span.rank == rank and span.end > page]
    require_warning(stopped.go_on(results), path, min(starts, default=len(whole)))


def duplicate(stopped: StoppedRun, dice: random.Random) -> None:
    """The records of one journal are appended to another one."""
    results = stopped.copy()
    for span in dice.sample(stopped.of_kind(RequestRecord), 5):
        with journal_path(results, 1 - span.rank).open("ab") as file:
            file.write(stopped.whole[span.rank][span.start : span.end])
    require_silence(stopped.go_on(results))


def swap(stopped: StoppedRun) -> None:
    results = stopped.copy()
    first, second = journal_paths(results)
    first.rename(first.with_name("swapped"))
    second.rename(first)
    first.with_name("swapped").rename(second)
    require_silence(stopped.go_on(results))


def copy_from_another_run(stopped: StoppedRun) -> None:
    results = stopped.copy()
    path = journal_path(results, 7)
    with JournalWriter(path, fingerprint="another") as journal:
        journal.append(RequestRecord(index=0, id="0", finish="stop"))
    stopped.go_on_after_refusal(results, path, words="belongs to an unfinished run with other")


def replace(stopped: StoppedRun, make: Callable[[Path], object]) -> None:
    """Another thing has the name of a journal."""
    results = stopped.copy()
    path = journal_paths(results)[1]
    path.unlink()
    make(path)
    stopped.go_on_after_refusal(results, path, words=JournalReader.REMEDY)


def cases(rehearsal: Rehearsal, dice: random.Random, flips: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """`flips` flipped bits, in every part of a journal in turn, and each other damage."""
    stopped = cache(lambda: StoppedRun(rehearsal))
    of_all, payload = (RequestRecord, TraceRecord, RankRecord), slice(FRAME_BYTES, None)
    places: list[tuple[str, Callable[..., None]]] = [
        ("a header", flip_in_header),
        ("a length", lambda *given: flip_in_record(*given, LENGTH, *of_all)),
        ("a checksum", lambda *given: flip_in_record(*given, CHECKSUM, *of_all)),
        *(
            (name, lambda *given, kind=kind: flip_in_record(*given, payload, kind))
            for name, kind in (("a request", RequestRecord), ("a routing", TraceRecord), ("a rank", RankRecord))
        ),
    ]
    for number in range(flips):
        name, check = places[number % len(places)]
        yield (
            f"bit flipped in {name}",
            partial(lambda check, seed: check(stopped(), random.Random(seed)), check, dice.random()),
        )
    others: list[tuple[str, Callable[..., None]]] = [
        ("journal torn", tear),
        ("journal torn in its header", tear_header),
        ("page of zeros", partial(zero_page, at_end=False)),
        ("page of zeros at the end", partial(zero_page, at_end=True)),
        ("records written twice", duplicate),
    ]
    for name, check in others:
        for _ in range(max(flips // 10, 1)):
            yield name, partial(lambda check, seed: check(stopped(), random.Random(seed)), check, dice.random())
    yield "journals swapped", lambda: swap(stopped())
    yield "journal of another run", lambda: copy_from_another_run(stopped())
    for make in (Path.mkdir, os.mkfifo, Path.touch):
        yield "no journal in its place", lambda make=make: replace(stopped(), make)
