"""The merge, killed at every line; and journals torn at every byte."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from faults.rehearsal import require
from moempi.storage.files import remove_hidden
from moempi.storage.journal import (
    JournalReader,
    JournalWriter,
    journal_path,
    journal_paths,
    journals_folder,
    remove_journals,
)
from moempi.storage.merge import Provenance, merge
from moempi.storage.records import RequestRecord
from moempi.storage.results import ResultFile

WATCHED = ("merge.py", "files.py", "journal.py", "records.py", "journal_index.py", "hdf5.py", "closeable.py")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
PROVENANCE = Provenance(
    job="", versions={}, world_size=2, hosts=("a",), weights="w", fast_products=False, start=NOW, end=NOW
)
NUM_REQUESTS = 6


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """A kill at each line of the merge and of the removal of the journals, and a tear at each byte."""
    results = folder / "merging" / "r.h5"
    write_journals(results)
    for line in range(1, count_lines(results) + 1):
        yield "SIGKILL at a line of merge", lambda line=line: kill_at(results, line)
    num_bytes = write_journals(results)[1].stat().st_size
    for length in range(num_bytes - 400, num_bytes):
        yield "journal torn at a byte", lambda length=length: tear_at(results, length)


def write_journals(results: Path) -> list[Path]:
    for rank in range(2):
        journal_path(results, rank).unlink(missing_ok=True)
        with JournalWriter(journal_path(results, rank), fingerprint="run") as journal:
            for index in range(rank, NUM_REQUESTS, 2):
                journal.append(RequestRecord(index=index, id=f"../{index}", finish="stop", text="x" * 100))
    return journal_paths(results)


def conclude(results: Path) -> None:
    """The work of the first rank at the end of a run."""
    merge(results, journal_paths(results), num_requests=NUM_REQUESTS, provenance=PROVENANCE)
    remove_journals(results)


def count_lines(results: Path) -> int:
    lines = [0]

    def count() -> None:
        lines[0] += 1

    traced(count, results)
    return lines[0]


def kill_at(results: Path, line: int) -> None:
    """Kill a child process at its `line`-th line; then the results or all journals must be complete."""
    results.unlink(missing_ok=True)
    write_journals(results)
    child = os.fork()
    if child == 0:
        remaining = [line]

        def kill() -> None:
            remaining[0] -= 1
            if not remaining[0]:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            traced(kill, results)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    require(os.WIFSIGNALED(status), "was not killed")
    remove_hidden(results)
    if journals_folder(results).exists():
        conclude(results)
    with ResultFile(results) as file:
        require([record.id for record in file.requests()] == [f"../{i}" for i in range(NUM_REQUESTS)], "lost requests")
    require([entry.name for entry in results.parent.iterdir()] == ["r.h5"], "leaves files")


def traced(on_line: Callable[[], None], results: Path) -> None:
    """Conclude, and call `on_line` at every line of the modules in WATCHED."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if Path(frame.f_code.co_filename).name not in WATCHED:
            return None
        if event == "line":
            on_line()
        return trace

    sys.settrace(trace)
    try:
        conclude(results)
    finally:
        sys.settrace(None)


def tear_at(results: Path, length: int) -> None:
    """The records before the tear are kept, and the writer continues after them."""
    _, path = write_journals(results)
    found = list(JournalReader(path).records())
    ends = [*(offset for offset, _ in found[1:]), path.stat().st_size]
    path.write_bytes(path.read_bytes()[:length])
    kept = [record.index for (_, record), end in zip(found, ends, strict=True) if end <= length]
    with JournalWriter(path, fingerprint="run") as journal:
        journal.append(RequestRecord(index=99, id="next", finish="stop"))
    require([record.index for _, record in JournalReader(path).records()] == [*kept, 99], f"torn at byte {length}")
