"""The recorder of a rank: it writes finished requests to the journal and counts them."""

from collections import Counter
from collections.abc import Callable, Iterable
from time import perf_counter

from moempi.engine.earlier import Earlier
from moempi.engine.request import Request
from moempi.storage.journal import JournalWriter
from moempi.storage.records import Record, RequestRecord


class Recorder:
    """Writes each finished request to `journal` at once, and counts steps, tokens and requests.

    The ranks of a tensor group finish the same requests; only one of them has `writes_records`. Every step calls
    `on_progress(finished, tokens)` with the sums of `counts` over all ranks. `exact` of `referenced` outputs equal
    their reference. `disk_s` counts the seconds spent writing. The first step of this attempt at the job is `since`.
    """

    def __init__(
        self,
        journal: JournalWriter,
        *,
        task: str,
        writes_records: bool,
        on_progress: Callable[[int, int], None],
        since: int = 0,
    ) -> None:
        self.steps = 0
        self.tokens = 0
        self.finishes: Counter[str] = Counter()
        self.referenced = 0
        self.exact = 0
        self.disk_s = 0.0
        self.on_progress = on_progress
        self._journal = journal
        self._task = task
        self._writes_records = writes_records
        self._since = since

    def muted(self) -> "Recorder":
        """A recorder that writes and reports nothing."""
        return Recorder(self._journal, task=self._task, writes_records=False, on_progress=lambda finished, tokens: None)

    def add_earlier(self, earlier: Earlier) -> None:
        """Count the requests that earlier attempts finished; for one rank of the run."""
        self.finishes.update(earlier.finishes)
        self.exact += earlier.exact
        self.referenced += earlier.referenced

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of finished requests and of their tokens, scored or generated."""
        return self.finishes.total(), self.tokens

    def end_step(self, finished: Iterable[Request]) -> None:
        """Count a step, and record the requests that it finished."""
        self.steps += 1
        self.record(finished)

    def record(self, finished: Iterable[Request]) -> None:
        """Write and count finished requests; raises StorageError if writing fails."""
        for request in finished if self._writes_records else ():
            record = self._to_record(request)
            self.append(record)
            self.tokens += len(record.score) + len(record.tokens)
            self._count(record)

    def append(self, record: Record) -> None:
        """Write a record of any kind; raises StorageError if writing fails."""
        begin = perf_counter()
        self._journal.append(record)
        self.disk_s += perf_counter() - begin

    def _to_record(self, request: Request) -> RequestRecord:
        """The record of a finished request, or of an error if its values fit in none: it ends alone."""
        try:
            return request.to_record(task=self._task, since=self._since)
        except ValueError as error:
            failed = Request(request.prompt, request.prompt_tokens, limit=0)
            failed.fail(f"its results cannot be recorded: {error}")
            return failed.to_record(task=self._task, since=self._since)

    def _count(self, record: RequestRecord) -> None:
        self.finishes[record.finish] += 1
        if record.reference is not None:
            self.referenced += 1
            self.exact += record.text == record.reference
