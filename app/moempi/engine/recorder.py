"""The recorder of a rank: it writes finished requests to the journal and counts them."""

from collections import Counter
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Protocol

import numpy as np

from moempi.arrays import IntArray
from moempi.config.job import HiddenPositions
from moempi.engine.earlier import Earlier
from moempi.engine.latency import count_latencies, no_latencies
from moempi.engine.request import Request
from moempi.engine.sequences import NO_WORK, Work
from moempi.engine.tasks import Tables
from moempi.observe.progress import Counts
from moempi.storage.records import Record, RequestRecord, TraceRecord


class Journal(Protocol):
    """Where records go: the journal of a job, or a list of them."""

    def append(self, record: Record, /) -> None:
        """Add one record; raises StorageError if writing fails."""


class Recorder:
    """Writes each finished request to `journal` at once, and counts steps, tokens and requests.

    The ranks of a tensor group finish the same requests; only one of them has `writes_records`. Every step calls
    `on_progress` with the sums of `counts` over all ranks. `exact` of `referenced` outputs equal their reference.
    `disk_s` counts the seconds spent writing. The first step of this attempt at the job is `since`;
    `hidden` are the positions whose hidden states are recorded, if any.
    """

    def __init__(
        self,
        journal: Journal,
        *,
        task: str,
        writes_records: bool,
        on_progress: Callable[[Counts], None],
        since: int = 0,
        hidden: HiddenPositions | None = None,
    ) -> None:
        self.steps = 0
        self.tokens = 0
        self.finishes: Counter[str] = Counter()
        self.referenced = 0
        self.exact = 0
        self.disk_s = 0.0
        self.latencies = no_latencies()
        self.on_progress = on_progress
        self._journal = journal
        self._task = task
        self._writes_records = writes_records
        self._since = since
        self._hidden = hidden
        self._prompt_tokens = 0
        self._generated = 0

    def muted(self) -> "Recorder":
        """A recorder that writes and reports nothing."""
        return Recorder(self._journal, task=self._task, writes_records=False, on_progress=lambda counts: None)

    def add_earlier(self, earlier: Earlier) -> None:
        """Count the requests that earlier attempts finished; for one rank of the run."""
        self.finishes.update(earlier.finishes)
        self.exact += earlier.exact
        self.referenced += earlier.referenced

    def counts(self, *, running: int = 0) -> Counts:
        """The counts of this rank, of which `running` requests have a slot."""
        finished, errors = self.finishes.total(), self.finishes["error"]
        if not self._writes_records:
            return Counts(finished, errors=errors)
        return Counts(finished, self.tokens, running, self._prompt_tokens, self._generated, errors)

    def end_step(self, finished: Iterable[Request], work: Work = NO_WORK) -> None:
        """Count a step with its `work`, which is done, and record the requests that it finished."""
        self.steps += 1
        self._prompt_tokens += int(work.of_prompt.sum())
        self._generated += int(work.ends.sum()) if self._task == "generate" else 0
        self.record(finished)

    def record(self, finished: Iterable[Request]) -> None:
        """Write and count finished requests; raises StorageError if writing fails."""
        for request in finished if self._writes_records else ():
            record = self._to_record(request)
            self.append(record)
            self.tokens += len(record.score) + len(record.tokens)
            self._count(record)

    def record_rows(self, requests: IntArray, positions: IntArray, tables: Tables) -> None:
        """Write values at positions (T,) of requests (T,) of the current step; raises StorageError if writing fails."""
        for table, columns in tables.items() if len(requests) else ():
            self.append(
                TraceRecord(
                    table=table,
                    since=self._since,
                    step=self._since + self.steps,
                    rank=0,
                    layers=(),
                    requests=requests.astype(np.int64, copy=False),
                    positions=positions.astype(np.int32),
                    columns=dict(columns),
                )
            )

    def append(self, record: Record) -> None:
        """Write a record of any kind; raises StorageError if writing fails."""
        begin = perf_counter()
        self._journal.append(record)
        self.disk_s += perf_counter() - begin

    def _to_record(self, request: Request) -> RequestRecord:
        """The record of a finished request, or of an error if its values fit in none: it ends alone."""
        try:
            return request.to_record(task=self._task, since=self._since, hidden=self._hidden)
        except ValueError as error:
            failed = Request(request.prompt, request.prompt_tokens, limit=0)
            failed.fail(f"its results cannot be recorded: {error}")
            return failed.to_record(task=self._task, since=self._since)

    def _count(self, record: RequestRecord) -> None:
        self.finishes[record.finish] += 1
        count_latencies(self.latencies, record)
        if record.reference is not None:
            self.referenced += 1
            self.exact += record.text == record.reference
