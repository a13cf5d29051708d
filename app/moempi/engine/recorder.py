"""The ledger: what a rank has done so far, in its part of the results and in numbers."""

from collections import Counter
from collections.abc import Callable, Iterable
from time import perf_counter

from moempi.engine.request import Sequence
from moempi.engine.restart import Earlier
from moempi.storage.journal import PartWriter
from moempi.storage.records import Record, RequestRecord


class Ledger:
    """Writes each finished sequence to `part` at once. `show` hears the sums over all ranks after every step.

    The ranks of a tensor group finish the same sequences; one of them `keeps_records`.
    """

    def __init__(self, part: PartWriter, *, task: str, keeps_records: bool, show: Callable[[int, int], None]) -> None:
        self.steps = 0
        self.tokens = 0
        self.finishes: Counter[str] = Counter()
        self.referenced = 0
        self.exact = 0
        self.disk_s = 0.0
        self.show = show
        self._part = part
        self._task = task
        self._keeps_records = keeps_records

    def silent(self) -> "Ledger":
        """A ledger that writes and shows nothing."""
        return Ledger(self._part, task=self._task, keeps_records=False, show=lambda finished, tokens: None)

    def count_earlier(self, earlier: Earlier) -> None:
        """Count requests that earlier attempts finished; on one rank."""
        self.finishes.update(earlier.finishes)
        self.exact += earlier.exact
        self.referenced += earlier.referenced

    @property
    def counts(self) -> tuple[int, int]:
        """Finished requests, and tokens that came of them (scored or generated)."""
        return self.finishes.total(), self.tokens

    def end_step(self, finished: Iterable[Sequence]) -> None:
        """Enter one step and the sequences that it finished."""
        self.steps += 1
        self.enter(finished)

    def enter(self, finished: Iterable[Sequence]) -> None:
        """Write finished sequences; raises StorageError when the disk does not take them."""
        for sequence in finished if self._keeps_records else ():
            record = sequence.record(task=self._task)
            self.write(record)
            self.tokens += len(record.score) + len(record.tokens)
            self._count(record)

    def write(self, record: Record) -> None:
        """Write any record; raises StorageError when the disk does not take it."""
        begin = perf_counter()
        self._part.append(record)
        self.disk_s += perf_counter() - begin

    def _count(self, record: RequestRecord) -> None:
        self.finishes[record.finish] += 1
        if record.reference is not None:
            self.referenced += 1
            self.exact += record.text == record.reference
