"""Restart: an attempt at a job skips what earlier attempts finished, and records its own state in `run.json`."""

import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray
from moempi.backend.select import find_gpus
from moempi.config.job import Job, result_keys
from moempi.errors import DataError, StorageError
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.files import digest_file, remove_hidden
from moempi.storage.journal import JournalReader, JournalWriter, journal_path, journal_paths, remove_journals
from moempi.storage.lock import OutputLock
from moempi.storage.records import RequestRecord, RoutingRecord
from moempi.storage.run_state import RunState, State, finished, is_replaced, results_identity, state_path, write_state

log = logging.getLogger(__name__)

STOPPED = 75  # EX_TEMPFAIL
STATE_EVERY_S = 10.0
"""Seconds between updates of `run.json` during the run."""
STATE_LIMIT_S = 1.0
"""Seconds that a failing rank waits for `run.json` to be written."""
FINISHES = ("stop", "length", "error")
_FINISHED_REQUEST = np.dtype(
    [("index", "i8"), ("tokens", "i8"), ("finish", "i1"), ("referenced", "i1"), ("exact", "i1")]
)

FinishedRequests = npt.NDArray[np.void]
"""Finished requests: index, tokens, index in FINISHES, whether it has a reference, whether its text equals it."""


@dataclass(frozen=True, eq=False)
class Earlier:
    """The requests that earlier attempts at the job finished; they recorded the routing of steps below `next_step`.

    `indices` (n,) ascend.
    """

    indices: IntArray
    finishes: Counter[str]
    tokens: int
    referenced: int
    exact: int
    next_step: int = 0

    @classmethod
    def from_finished(cls, finished: FinishedRequests, *, next_step: int = 0) -> "Earlier":
        """Count each request once, however often it was recorded."""
        once = finished[np.unique(finished["index"], return_index=True)[1]]
        return cls(
            indices=once["index"].copy(),
            finishes=Counter(FINISHES[finish] for finish in once["finish"].tolist()),
            tokens=int(once["tokens"].sum()),
            referenced=int(once["referenced"].sum()),
            exact=int(once["exact"].sum()),
            next_step=next_step,
        )


NOTHING_EARLIER = Earlier.from_finished(np.zeros(0, _FINISHED_REQUEST))


def run_fingerprint(job: Job, *, weights: str) -> str:
    """Digest of everything that the results depend on: weights, prompts, and the job's `result_keys`.

    Raises NoInputError if the prompts cannot be read.
    """
    contents = (weights, digest_file(job.input.prompts), result_keys(job))
    return blake2b(msgspec.json.encode(contents), digest_size=16).hexdigest()


def finished_requests(journals: Iterable[Path], fingerprint: str) -> tuple[FinishedRequests, int, list[str]]:
    """The finished requests, the first step number above all recorded ones, and a sentence about each bad journal.

    Damage and incomplete records at the end are skipped. Raises StorageError if a journal has another fingerprint or
    cannot be read.
    """
    finished, next_step, problems = [], 0, []
    for path in journals:
        with JournalReader(path) as journal:
            if journal.fingerprint != fingerprint:
                raise StorageError(
                    f"{path}: belongs to an unfinished run with other weights, prompts or settings; finish that run, "
                    f"remove {path.parent} to give it up, or choose another output.results"
                )
            for _, record in journal.records():
                if isinstance(record, RequestRecord):
                    finished.append(_entry(record))
                elif isinstance(record, RoutingRecord):
                    next_step = max(next_step, record.step + 1)
            if journal.problem:
                problems.append(journal.problem)
    return np.array(finished, _FINISHED_REQUEST), next_step, problems


def _entry(record: RequestRecord) -> tuple[int, int, int, bool, bool]:
    tokens = len(record.score) + len(record.tokens)
    referenced = record.reference is not None
    exact = referenced and record.text == record.reference
    return record.index, tokens, FINISHES.index(record.finish), referenced, exact


class Attempt:
    """One attempt at a job, with exclusive access to the job's output until `finish` or the end of its processes.

    The job has `num_requests`; `earlier` holds those that need not be computed again, `journal` takes this rank's
    records. Making an attempt is collective and blocks. It ends all ranks if another run holds the output, if the
    journals belong to another job, if the ranks read different prompts or weights, or if the disk fails.
    """

    def __init__(self, job: Job, world: World, *, weights: str, num_requests: int) -> None:
        self.num_requests = num_requests
        self._results = job.output.results
        self._world = world
        self._counts = (0, 0)
        self._state_due = time.monotonic() + STATE_EVERY_S
        self._problems: list[str] = []
        self._lock = world.collectively(lambda: _take_output(self._results) if world.rank == 0 else None)
        resolved = _with_resolved_backend(job, world)
        fingerprint = world.collectively(lambda: run_fingerprint(resolved, weights=weights))
        world.collectively(lambda: _require_equal(fingerprint, world.comm.bcast(fingerprint)))
        self._begin = RunState(
            state="running",
            requests=num_requests,
            world_size=world.size,
            started=_now(),
            updated=_now(),
            replaces=results_identity(self._results),
        )
        world.on_failure(self._write_failure)
        self.earlier = self._scan(fingerprint)
        self._counts = (len(self.earlier.indices), 0)
        self.journal = world.collectively(
            lambda: JournalWriter(journal_path(self._results, world.rank), fingerprint=fingerprint)
        )
        world.collectively(lambda: self.write_state("running"))

    def also_writing_state(self, on_progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """An `on_progress(finished, tokens)` that calls the given one and writes both sums to `run.json` at times."""

        def on_progress_and_write(finished: int, tokens: int) -> None:
            on_progress(finished, tokens)
            self._update_state(finished, tokens)

        return on_progress_and_write

    def _update_state(self, finished: int, tokens: int) -> None:
        self._counts = (finished, tokens)
        if self._world.rank == 0 and time.monotonic() >= self._state_due:
            self._state_due = time.monotonic() + STATE_EVERY_S
            try:
                self.write_state("running")
            except StorageError as error:
                log.warning("%s", error)

    def write_state(self, state: State, *, reason: str = "", exit_code: int = 0) -> None:
        """Write `run.json`, on rank 0 only; raises StorageError if writing fails."""
        if self._world.rank == 0:
            write_state(self._results, self._state(state, reason=reason, exit_code=exit_code))

    def warn_of_damage(self) -> None:
        """Log on rank 0 which journals of earlier attempts are damaged or have a torn end."""
        for problem in self._problems if self._world.rank == 0 else ():
            log.warning("%s; its lost requests are computed again", problem)

    def warn_of_new_damage(self, problems: Iterable[str]) -> None:
        """Log the problems that the merge found and that were not there when the attempt began."""
        for problem in sorted(set(problems) - set(self._problems)):
            log.warning("%s; the results are whole", problem)

    def journals(self) -> list[Path]:
        """The journals of this attempt and of earlier ones."""
        # The listing of the folder may miss new files of other nodes.
        own = [journal_path(self._results, rank) for rank in range(self._world.size)]
        return list(dict.fromkeys([*journal_paths(self._results), *own]))

    def stop(self, stop: Stop) -> int:
        """End an attempt that was stopped: write the state and print a line; return STOPPED. Collective, blocks."""
        reason = max(self._world.comm.allgather((stop.requested, stop.reason)))[1]
        self._world.collectively(lambda: self.write_state("stopped", reason=reason, exit_code=STOPPED))
        if self._world.rank == 0:
            finished = f"{self._counts[0]} of {self._begin.requests} requests are finished"
            print(f"moempi: stopped early ({reason}), {finished}; run the same job again to continue", file=sys.stderr)
        return STOPPED

    def finish(self) -> None:
        """End an attempt whose results are complete: write the state, remove the journals, release the output.

        For rank 0. A failure is a warning: the results are whole, and the next attempt merges left journals again.
        """
        try:
            self.write_state("finished")
            remove_journals(self._results)
        except StorageError as error:
            log.warning("the results are whole, but %s", error)
        if self._lock is not None:
            self._lock.release()

    def _scan(self, fingerprint: str) -> Earlier:
        """The requests in all journals, of which each rank reads its share; collective."""
        comm = self._world.comm
        paths = comm.bcast(journal_paths(self._results) if comm.rank == 0 else None)
        share = self._world.collectively(lambda: finished_requests(paths[comm.rank :: comm.size], fingerprint))
        finished, steps, problems = zip(*comm.allgather(share), strict=True)
        self._problems = sorted(chain.from_iterable(problems))
        return Earlier.from_finished(np.concatenate(finished), next_step=max(steps))

    def _state(self, state: State, *, reason: str, exit_code: int) -> RunState:
        finished, tokens = self._counts
        return msgspec.structs.replace(
            self._begin,
            state=state,
            reason=reason,
            rank=self._world.rank,
            phase="" if state == "finished" else self._world.where,
            finished=finished,
            tokens=tokens,
            exit_code=exit_code,
            updated=_now(),
        )

    def _write_failure(self, cause: str, exit_code: int) -> int:
        """Write on the failing rank that the run failed, unless its results are in place; returns the exit code.

        Rank 0 may put them in place meanwhile, so they are looked for before and after. Gives up if writing blocks.
        """
        state, replaces = self._state("failed", reason=cause, exit_code=exit_code), self._begin.replaces or ""
        codes = [exit_code]

        def write() -> None:
            with suppress(StorageError):
                if not is_replaced(self._results, replaces):
                    write_state(self._results, state)
                if is_replaced(self._results, replaces):
                    codes.append(0)
                    write_state(self._results, finished(state))

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(STATE_LIMIT_S)
        return codes[-1]


def _with_resolved_backend(job: Job, world: World) -> Job:
    """The job with the backend that "auto" selects; it stays "auto" if ranks differ. Collective."""
    on_gpu = job.run.backend != "numpy" and find_gpus()[0] > 0
    backends: set[Literal["numpy", "cupy"]] = set(world.comm.allgather("cupy" if on_gpu else "numpy"))
    backend = backends.pop() if len(backends) == 1 else "auto"
    return msgspec.structs.replace(job, run=msgspec.structs.replace(job.run, backend=backend))


def _take_output(results: str) -> OutputLock:
    """Lock the output and remove the hidden files that a killed run left beside it."""
    lock = OutputLock(results)
    remove_hidden(results)
    remove_hidden(state_path(results))
    return lock


def _require_equal(own: str, first: str) -> None:
    if own != first:
        raise DataError("this rank reads other weights or prompts than rank 0: is the file the same on every node?")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
