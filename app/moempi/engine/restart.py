"""Restart: an attempt at a job skips what earlier attempts finished, and records its own state in `run.json`."""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path

import msgspec
import numpy as np

from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.engine.earlier import NOTHING_EARLIER, Earlier, finished_requests, with_traces
from moempi.engine.inputs import Inputs
from moempi.engine.recovery import Recovery
from moempi.engine.summary import Totals
from moempi.engine.traced_rows import TracedRows
from moempi.errors import StorageError
from moempi.observe.progress import Counts
from moempi.printing import one_line, print_error, printable
from moempi.runtime.reductions import gather_on_root
from moempi.runtime.stop import Stop
from moempi.runtime.world import World
from moempi.storage.journal import (
    JournalWriter,
    Problem,
    journal_path,
    journal_paths,
    journals_folder,
    remove_journals,
)
from moempi.storage.records import Record
from moempi.storage.run_state import (
    TOUCH_EVERY_S,
    RunState,
    State,
    finished,
    is_replaced,
    results_identity,
    touch_state,
    write_state,
)

log = logging.getLogger(__name__)

STOPPED = 75  # EX_TEMPFAIL
STATE_PAUSE_S = 1.0
STATE_MAX_PAUSE_S = 10.0
"""Seconds between updates of `run.json`: they double, so that also the state of a short run shows its progress."""
STATE_LIMIT_S = 1.0
"""Seconds that a failing rank waits for `run.json` to be written."""


def traced_rows(job: Job, architecture: Architecture) -> dict[str, tuple[str, int]]:
    """The tables that a job records: the field of FinishedRequests that counts a request's rows, and the layers."""
    routing = {"routing": ("computed", len(architecture.moe_layers))} if job.trace.has_routing else {}
    hidden = {"hidden": ("hidden_rows", len(set(job.trace.hidden)))} if job.trace.hidden else {}
    kept = {"score": job.score.top_n, "above": job.score.threshold} if job.task == "score" else {}
    return routing | hidden | {table: ("scored", 1) for table, setting in kept.items() if setting}


class NoJournal:
    """The journal of a rank that records nothing."""

    def append(self, record: Record) -> None:
        """Raise RuntimeError, because the record would be lost."""
        raise RuntimeError(f"a rank without a journal has a {type(record).__name__}")

    def close(self) -> None:
        """Do nothing."""


class Attempt:
    """One attempt at a job, with exclusive access to the job's output until `finish` or the end of its processes.

    The job has `num_requests`, as far as its prompts are read: `has_more` is whether they are not read to their end.
    `earlier` holds the requests that need not be computed again, their indices on rank 0 alone.
    `journal` takes this rank's records from `begin` on. A finished request that lost recorded rows is not
    among the earlier ones. Making an attempt is collective and blocks, if there are journals. It ends all ranks if they
    belong to another job or cannot be read.
    """

    def __init__(self, world: World, inputs: Inputs, *, max_errors: int | None = None) -> None:
        job, num_requests = inputs.job, inputs.counts.requests
        self.num_requests, self.has_more = num_requests, inputs.has_more
        self._rows_of = traced_rows(job, inputs.weights.architecture)
        self._num_untraced = 0
        self._may_replace = False
        self._written: os.stat_result | None = None
        self._results = job.output.results
        self._world = world
        self._counts = (0, 0, 0)
        self._exit_code = 0
        self._state_pause_s = STATE_PAUSE_S
        self._state_due = time.monotonic() + STATE_PAUSE_S
        self._state_error = False
        self._ended, self._state_request, self._state_lock = threading.Event(), threading.Event(), threading.Lock()
        self._problems: list[Problem] = []
        self._lock = inputs.lock
        self._fingerprint = inputs.fingerprint
        self._recovery = Recovery.from_state(self._results) if world.rank == 0 else None
        self._begin = RunState(
            state="running",
            requests=num_requests,
            world_size=world.size,
            started=_now(),
            updated=_now(),
            job=printable(os.environ.get("SLURM_JOB_ID", "")),
            host=printable(os.uname().nodename),
            process=os.getpid(),
            replaces=results_identity(self._results),
            max_errors=max_errors,
        )
        world.on_failure(self._write_failure, before=self._end_updates)
        self.earlier = self._scan() if inputs.has_journals else NOTHING_EARLIER
        self._counts = (self.earlier.finishes.total(), 0, self.earlier.finishes["error"])
        self.journal: JournalWriter | NoJournal = NoJournal()

    def also_writing_state(self, on_progress: Callable[[Counts], None]) -> Callable[[Counts], None]:
        """An `on_progress` that calls the given one; at times a thread of rank 0 then writes `run.json`."""

        def on_progress_and_write(counts: Counts) -> None:
            on_progress(counts)
            if self._recovery is not None and self._recovery.is_over(counts):
                print_error(self._recovery.text())
                self._recovery = None
            self.count(counts)
            self._request_state()

        return on_progress_and_write

    def expect(self, num_requests: int, *, has_more: bool) -> None:
        """From now on the job has `num_requests`, as far as its prompts are read.

        Raises StorageError on rank 0 if an earlier attempt has finished a request beyond the last one.
        """
        self.num_requests, self.has_more = num_requests, has_more
        self._begin = msgspec.structs.replace(self._begin, requests=num_requests)
        if self._world.rank > 0 or has_more:
            return
        self._update_state()  # if the run is killed behind its results, a reader of the state takes the number from it
        if len(self.earlier.indices) and (last := self.earlier.indices[-1]) >= num_requests:
            raise StorageError(
                f"{journals_folder(self._results)}: has a request {last}, the job has {num_requests} requests; "
                "remove it to give up the unfinished run"
            )

    def count(self, counts: Counts) -> None:
        """Set the counts of the run so far, which the state says when it is written next."""
        self._counts = (counts.finished, counts.tokens, counts.errors)

    def _request_state(self) -> None:
        if time.monotonic() >= self._state_due:
            self._state_pause_s = min(2 * self._state_pause_s, STATE_MAX_PAUSE_S)
            self._state_due = time.monotonic() + self._state_pause_s
            self._state_request.set()

    def _keep_state(self) -> None:
        """Write the state on request, and otherwise touch it, until the attempt has ended.

        A thread, because no step waits for the disk, and weights are read and results merged for longer than SILENT_S
        without a step.
        """
        try:
            while not self._ended.is_set():
                if self._state_request.wait(TOUCH_EVERY_S):
                    self._state_request.clear()
                    self._update_state()
                else:
                    touch_state(self._results)
        except Exception as error:
            self._world.abort(error)

    def _update_state(self) -> None:
        with self._state_lock:
            if self._ended.is_set():
                return
            try:
                write_state(self._results, self._state("running", reason="", exit_code=0))
                self._state_error = False
            except StorageError as error:
                if self._state_error:  # a full disk ends the run before, at the next record
                    log.warning("%s", error)
                self._state_error = True
                touch_state(self._results)

    def _end_updates(self) -> None:
        """Let no other "running" state be written; waits up to STATE_LIMIT_S for one that is being written."""
        self._ended.set()
        self._state_request.set()
        if self._state_lock.acquire(timeout=STATE_LIMIT_S):
            self._state_lock.release()

    def begin(self, *, has_records: bool) -> None:
        """Open the journal of this rank, if it has records, and on rank 0 write the state; raises StorageError.

        Rank 0 always has a journal. Not collective.
        """
        if has_records or self._world.rank == 0:
            path = journal_path(self._results, self._world.rank)
            self.journal = JournalWriter(path, fingerprint=self._fingerprint)
        if self._world.rank == 0:
            self.write_state("running")
            threading.Thread(target=self._keep_state, name="state", daemon=True).start()

    def write_state(self, state: State, *, reason: str = "", exit_code: int = 0) -> None:
        """Write `run.json`, on rank 0 only; raises StorageError if writing fails."""
        if self._world.rank == 0:
            with self._state_lock:
                write_state(self._results, self._state(state, reason=reason, exit_code=exit_code))

    def warn_of_damage(self) -> None:
        """Log on rank 0 the problems of journals of earlier attempts, and how many requests lost recorded rows."""
        if self._world.rank > 0:
            return
        for problem in self._problems:
            log.warning("%s; its lost requests are computed again", problem)
        if self._num_untraced:
            log.warning("%d finished requests lost recorded rows; they are computed again", self._num_untraced)

    def warn_of_new_damage(self, problems: Iterable[Problem]) -> None:
        """Log the problems that the merge found and that were not there when the attempt began."""
        lost = ", recorded rows that are lost are not" if self._rows_of else ""
        for problem in sorted(set(problems) - set(self._problems)):
            log.warning("%s; all requests are in the results%s", problem, lost)

    def journals(self) -> list[Path]:
        """The journals of this attempt and of earlier ones."""
        # The listing of a folder may miss new files of other nodes, which are found by name.
        by_name = (journal_path(self._results, rank) for rank in range(self._world.size))
        return list(dict.fromkeys([*journal_paths(self._results), *filter(Path.exists, by_name)]))

    def stop(self, stop: Stop, totals: Totals) -> int:
        """End an attempt that was stopped: write the state and print a line; return STOPPED. Collective, blocks."""
        self._counts = (totals.num_finished, self._counts[1], totals.num_errors)
        self._world.collectively(self.journal.close)
        reason = self._world.comm.allreduce((stop.requested, stop.reason), max)[1]
        self._end_updates()
        self._world.collectively(lambda: self.write_state("stopped", reason=reason, exit_code=STOPPED))
        if self._world.rank == 0:
            read = " that were read" if self.has_more else ""
            finished = f"{self._counts[0]} of {self.num_requests} requests{read} are finished"
            print_error(f"stopped early ({reason}), {finished}; run the same job again to continue")
        return STOPPED

    def conclude(self, errors: int) -> int:
        """All requests are finished, `errors` of them with an error; the exit status once the results are in place."""
        self._counts = (self.num_requests, self._counts[1], errors)
        self._exit_code = finished(self._begin, errors=errors).exit_code
        return self._exit_code

    def begin_results(self) -> None:
        """This rank has closed its journal; once all ranks have, rank 0 may put the results in place."""
        self._may_replace = True

    def before_replace(self, results: Path) -> None:
        """Raise StorageError if another run may write the output by now; `results` are the new ones. For rank 0.

        Blocks if a rank is about to abort all ranks.
        """
        self._require_lock()
        self._written = results.stat()
        self._world.wait_if_aborting()  # last, so that the results are in place at once after it

    def finish(self) -> None:
        """End an attempt whose results are complete: write the state, remove the journals, release the output.

        For rank 0. A failure is a warning: the results are whole, and the next attempt merges left journals again.
        """
        self._end_updates()
        try:
            self.write_state("finished", exit_code=self._exit_code)
            self._require_lock()  # otherwise they are another run's
            remove_journals(self._results)
        except StorageError as error:
            log.warning("the results are whole, but %s", error)
        if self._lock is not None:
            self._lock.release()

    def _scan(self) -> Earlier:
        """The requests in all journals, of which each rank reads its share; their indices for rank 0 alone.

        Collective, blocks.
        """
        comm = self._world.comm
        paths = comm.bcast(journal_paths(self._results) if comm.rank == 0 else None)
        traced = TracedRows(self.num_requests, list(self._rows_of)) if self._rows_of else None
        share = self._world.collectively(
            lambda: finished_requests(
                paths[comm.rank :: comm.size],
                self._fingerprint,
                sys.maxsize if self.has_more else self.num_requests,
                traced=traced,
            )
        )
        finished, next_step, problems = share
        next_step = comm.allreduce(next_step, max)
        parts = gather_on_root(comm, finished.tobytes())
        requests = np.frombuffer(b"".join(parts), finished.dtype)
        self._problems = sorted(chain.from_iterable(comm.gather(problems) or ()))
        if traced is not None:
            requests, self._num_untraced = with_traces(requests, traced.reduce(comm.allreduce), self._rows_of)
        earlier = Earlier.from_finished(requests, next_step=next_step)
        of_first: Earlier = comm.bcast(replace(earlier, indices=earlier.indices[:0]))
        return earlier if comm.rank == 0 else of_first

    def _state(self, state: State, *, reason: str, exit_code: int) -> RunState:
        finished, tokens, errors = self._counts
        return msgspec.structs.replace(
            self._begin,
            state=state,
            reason=one_line(reason),
            rank=self._world.rank,
            phase="" if state == "finished" else self._world.where,
            finished=finished,
            errors=errors,
            tokens=tokens,
            exit_code=exit_code,
            slow_hosts=self._world.slow_hosts,
            loss=self._world.loss,
            updated=_now(),
        )

    def _write_failure(self, cause: str, exit_code: int) -> int:
        """Write on the failing rank that the run failed, unless its results are in place; returns the exit code.

        Rank 0 may put them in place meanwhile, so they are looked for before and after. Gives up if writing blocks.
        """
        state, codes = self._state("failed", reason=cause, exit_code=exit_code), [exit_code]
        self._end_updates()

        def write() -> None:
            with suppress(StorageError), self._state_lock:
                if not self._results_in_place():
                    write_state(self._results, state)
                if self._results_in_place():
                    codes.append(self._exit_code)
                    write_state(self._results, finished(state, errors=state.errors))

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(STATE_LIMIT_S)
        return codes[-1]

    def _results_in_place(self) -> bool:
        """Whether this attempt's results are in place; ranks above 0 take new results for their own."""
        if self._world.rank > 0:
            return self._may_replace and is_replaced(self._results, self._begin.replaces or "")
        with suppress(OSError):
            return self._written is not None and os.path.samestat(self._written, Path(self._results).stat())
        return False

    def _require_lock(self) -> None:
        if self._lock is not None:
            self._lock.require_in_place()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
