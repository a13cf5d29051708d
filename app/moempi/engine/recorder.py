"""The ledger: what a rank has done so far, in its part of the results and in numbers."""

from collections import Counter
from collections.abc import Callable, Iterable
from time import perf_counter

from moempi.engine.request import Request
from moempi.engine.restart import Earlier
from moempi.storage.journal import JournalWriter
from moempi.storage.records import Record, RequestRecord


class Recorder:
    """Writes each finished sequence to `part` at once. `show` hears the sums over all ranks after every step.

    The ranks of a tensor group finish the same sequences; one of them `keeps_records`.
    """

    def __init__(
        self, journal: JournalWriter, *, task: str, writes_records: bool, on_progress: Callable[[int, int], None]
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

    def muted(self) -> "Recorder":
        """A ledger that writes and shows nothing."""
        return Recorder(self._journal, task=self._task, writes_records=False, on_progress=lambda finished, tokens: None)

    def add_earlier(self, earlier: Earlier) -> None:
        """Count requests that earlier attempts finished; on one rank."""
        self.finishes.update(earlier.finishes)
        self.exact += earlier.exact
        self.referenced += earlier.referenced

    @property
    def counts(self) -> tuple[int, int]:
        """Finished requests, and tokens that came of them (scored or generated)."""
        return self.finishes.total(), self.tokens

    def end_step(self, finished: Iterable[Request]) -> None:
        """Enter one step and the sequences that it finished."""
        self.steps += 1
        self.record(finished)

    def record(self, finished: Iterable[Request]) -> None:
        """Write finished sequences; raises StorageError when the disk does not take them."""
        for sequence in finished if self._writes_records else ():
            record = sequence.to_record(task=self._task)
            self.append(record)
            self.tokens += len(record.score) + len(record.tokens)
            self._count(record)

    def append(self, record: Record) -> None:
        """Write any record; raises StorageError when the disk does not take it."""
        begin = perf_counter()
        self._journal.append(record)
        self.disk_s += perf_counter() - begin

    def _count(self, record: RequestRecord) -> None:
        self.finishes[record.finish] += 1
        if record.reference is not None:
            self.referenced += 1
            self.exact += record.text == record.reference
