"""The index of a run's journals, made before the merge: location and size of each request's record."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from moempi.errors import StorageError
from moempi.storage.closeable import Closeable, close_all
from moempi.storage.journal import JournalReader, Problem
from moempi.storage.records import RankRecord, Record, RequestRecord, TraceRecord
from moempi.storage.results_layout import ARRAYS, HOME, OFFSETS, OPTIONAL_TEXTS, SCORES, TABLE_LAYERS, TEXTS, TRACES

MAX_OPEN_JOURNALS = 64
BLOCK_BYTES = 16 << 20
ITEM_BYTES = 8
ENTRY_BYTES = 1024
METADATA_BYTES = 256 << 10
MOST_LAYERS = 1024

NO_LOAD, NO_SHIFTS = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)

R = TypeVar("R", bound=Record)

_COUNTS = ("computed", "hidden_first", "hidden_rows")
_LENGTHS = ("prompt_token", "output_token", "scored", "in_group", *_COUNTS, *TEXTS)
_OF_SCORES = {column.path for column in TRACES["score"].values()}
_ENTRY = np.dtype(
    [("journal", "i4"), ("offset", "i8"), ("num_bytes", "i8"), ("since", "i8")] + [(name, "u4") for name in _LENGTHS]
)


class Journals(Closeable):
    """All journals of a run, of which at most MAX_OPEN_JOURNALS are open at a time."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = paths
        self._opened: OrderedDict[int, JournalReader] = OrderedDict()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, number: int) -> JournalReader:
        """The journal with this number; raises StorageError if its run differs from the run of those opened before."""
        if number not in self._opened:
            if len(self._opened) == MAX_OPEN_JOURNALS:
                self._opened.popitem(last=False)[1].close()
            journal = self._opened[number] = JournalReader(self._paths[number])
            self._fingerprint = self._fingerprint or journal.fingerprint
            if journal.fingerprint != self._fingerprint:
                raise StorageError(f"{journal.path}: belongs to another run than {self._paths[0]}")
        self._opened.move_to_end(number)
        return self._opened[number]

    def request_at(self, entry: Any) -> RequestRecord:
        """The record at an entry of `JournalIndex.entries`; raises StorageError."""
        return self._record_at(int(entry["journal"]), int(entry["offset"]), RequestRecord)

    def trace_at(self, journal: int, offset: int) -> TraceRecord:
        """The trace record at an offset of a journal; raises StorageError."""
        return self._record_at(journal, offset, TraceRecord)

    def close(self) -> None:
        """Close the open journals."""
        close_all(self._opened.values())

    def _record_at(self, journal: int, offset: int, kind: type[R]) -> R:
        opened = self.open(journal)
        record = opened.record_at(offset)
        if not isinstance(record, kind):
            raise StorageError(f"{opened.path}: the record at byte {offset} has changed since it was found")
        return record


def trace_blocks(records: Iterable[TraceRecord]) -> Iterator[list[TraceRecord]]:
    """Yield lists of records, each of about BLOCK_BYTES."""
    block: list[TraceRecord] = []
    num_bytes = 0
    for record in records:
        block.append(record)
        num_bytes += record.num_bytes
        if num_bytes >= BLOCK_BYTES:
            yield block
            block, num_bytes = [], 0
    if block:
        yield block


class TableRows(Struct, frozen=True):
    """The rows of each request in a table: positions `first` (N,) to `first` + `num_rows` (N,) - 1.

    Only positions below `end` (N,) are recorded.
    """

    first: NDArray[np.int64]
    num_rows: NDArray[np.int64]
    end: NDArray[np.int64]


class TraceIndex:
    """Locations of the trace records of a table, 40 bytes each: attempt, set of layers, step, journal and offset.

    `columns` are the type of each column and its shape behind rows and layers, equal in all records. The records of
    all attempts have `num_bytes` of columns.
    """

    def __init__(self, first: TraceRecord) -> None:
        self.columns = _columns_of(first)
        self.num_bytes = 0
        self._layer_sets: dict[tuple[int, ...], int] = {}
        self._entries = array("q")

    @property
    def layers(self) -> list[int]:
        """The layers that are recorded, ascending."""
        return sorted({layer for layers in self._layer_sets for layer in layers})

    def add(self, record: TraceRecord, *, journal: int, offset: int) -> None:
        """Add the location of one record; raises ValueError if its columns differ from the others'."""
        if _columns_of(record) != self.columns:
            raise ValueError(f"it has the columns {_columns_of(record)}, others have {self.columns}")
        self.num_bytes += record.num_bytes
        layers = self._layer_sets.setdefault(record.layers, len(self._layer_sets))
        self._entries.extend((record.since, layers, record.step, journal, offset))

    def groups(self) -> Iterator[list[tuple[int, int]]]:
        """Yield (journal, offset) of the records of one attempt and the same layers, by step; attempts in order."""
        entries = np.frombuffer(self._entries, np.int64).reshape(-1, 5)
        entries = entries[np.lexsort(entries[:, 2::-1].T)]
        for group in np.split(entries, np.flatnonzero(np.diff(entries[:, :2], axis=0).any(axis=1)) + 1):
            yield [(journal, offset) for journal, offset in group[:, 3:].tolist()]


def _columns_of(record: TraceRecord) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type of each column of the results, and shape behind rows and layers."""
    columns = {name: (values.dtype.str, record.row_shape(name)) for name, values in record.columns.items()}
    kinds = {name: TRACES[record.table][name].dtypes[0] for name in HOME} if record.home else {}
    return columns | {name: (np.dtype(kind).str, ()) for name, kind in kinds.items()}


@dataclass(slots=True)
class JournalIndex:
    """The contents of all journals: location and field lengths of each request's record, and the ranks' records.

    `entries` (N,) has one entry per request, with journal -1 until its record is found. `expert_load` and `asked_load`
    (layers, experts) are summed over ranks, as is `shifts`. `problems` describes damage and records that are not used.
    """

    entries: NDArray[Any]
    ranks: list[RankRecord] = field(default_factory=list)
    expert_load: NDArray[np.int64] = field(default_factory=lambda: NO_LOAD)
    asked_load: NDArray[np.int64] = field(default_factory=lambda: NO_LOAD)
    shifts: NDArray[np.float32] = field(default_factory=lambda: NO_SHIFTS)
    top: int = 0
    score_top: int = 0
    scored: bool = False
    problems: list[Problem] = field(default_factory=list)
    traces: dict[str, TraceIndex] = field(default_factory=dict)
    _groups: dict[str, int] = field(default_factory=dict)

    def add_request(self, record: RequestRecord, *, journal: int, offset: int) -> None:
        """Add the location and lengths of a request's record, in the place of one that was added before."""
        arrays = [getattr(record, name) for name in ARRAYS]
        texts = [len((getattr(record, name) or "").encode()) for name in TEXTS]
        num_bytes = sum(array.nbytes for array in arrays) + sum(texts)
        group = self._groups.setdefault((record.group or "").replace("\0", "\u2400"), len(self._groups))
        lengths = len(record.prompt), len(record.tokens), len(record.score), group
        lengths += tuple(getattr(record, name) for name in _COUNTS)
        self.entries[record.index] = (journal, offset, num_bytes, record.since, *lengths, *texts)
        # Without tokens, a width is a number without values behind it.
        self.top = max(self.top, record.top_tokens.shape[1] if record.top_tokens.size else 0)
        self.score_top = max(self.score_top, record.score_top_tokens.shape[1] if record.score_top_tokens.size else 0)
        self.scored = self.scored or len(record.score) > 0

    def add_rank(self, record: RankRecord) -> None:
        """Add the expert loads of a record to the sums, if it has any, and keep the rest of it.

        Raises ValueError if it counts other layers or experts than the records before.
        """
        if record.expert_load.size:
            if not self.expert_load.size:
                self.expert_load = np.zeros_like(record.expert_load)
            if record.expert_load.shape != self.expert_load.shape:
                counted = f"{record.expert_load.shape}, others as {self.expert_load.shape}"
                raise ValueError(f"rank {record.rank} counted experts as {counted}")
            self.expert_load += record.expert_load
        if record.asked_load.size:
            self.asked_load = self.asked_load + record.asked_load if self.asked_load.size else record.asked_load
            self.shifts = self.shifts + record.shifts if self.shifts.size else record.shifts
        nothing = {"expert_load": NO_LOAD, "asked_load": NO_LOAD, "shifts": NO_SHIFTS}
        self.ranks.append(msgspec.structs.replace(record, **nothing))

    def add_trace(self, record: TraceRecord, *, journal: int, offset: int) -> None:
        """Add the location of the rows of one rank and step; raises ValueError as `TraceIndex.add` does."""
        if len(record.requests):
            self.traces.setdefault(record.table, TraceIndex(record)).add(record, journal=journal, offset=offset)

    def table_rows(self, table: str) -> TableRows:
        """The rows of each request in a table."""
        entries = self.entries
        if table in SCORES:
            num_tokens, scored = (entries[name].astype(np.int64) for name in ("prompt_token", "scored"))
            return TableRows(np.zeros(len(entries), np.int64), num_tokens, scored)
        first, num_rows = np.zeros(len(entries), np.int64), entries["computed"].astype(np.int64)
        if table == "hidden":
            first, num_rows = (entries[name].astype(np.int64) for name in ("hidden_first", "hidden_rows"))
        return TableRows(first, num_rows, first + num_rows)

    @property
    def has_statistics(self) -> bool:
        """Whether the norms of experts' outputs are recorded, and ranks say how many experts there are."""
        return "routing" in self.traces and "norms" in self.traces["routing"].columns and bool(self.ranks)

    @property
    def groups(self) -> list[str]:
        """The names of all groups of prompts, sorted; "" is of prompts without one."""
        return sorted(self._groups)

    @property
    def group_of_request(self) -> NDArray[np.int64]:
        """The number of each request's group in `groups` (N,)."""
        ranks = np.argsort(np.argsort(list(self._groups)))
        numbers: NDArray[np.int64] = ranks[self.entries["in_group"]]
        return numbers

    def moe_layers(self) -> list[int]:
        """The MoE layers, in which ranks host experts; all layers if no rank says what it hosts."""
        layers = range(len(self.expert_load))
        hosted = {layer for record in self.ranks for layer, experts in record.hosted.items() if experts}
        return sorted(hosted.intersection(layers)) or list(layers)

    def texts(self) -> list[str]:
        """The text columns to write; the optional ones only if a request has any."""
        return [name for name in TEXTS if name not in OPTIONAL_TEXTS or self.entries[name].any()]

    def arrays(self) -> list[str]:
        """The array columns to write; likeliest tokens and scores only if requested."""
        dims = self.sizes()
        return [
            name
            for name, kind in ARRAYS.items()
            if all(dim in dims for dim in kind.dims)
            and (self.scored or not name.startswith("score"))
            and not ("score" in self.traces and kind.path in _OF_SCORES)
        ]

    def sizes(self) -> dict[str, int]:
        """The dimensions of the file and their sizes."""
        num_requests = len(self.entries)
        sizes = {"request": num_requests, "request_bound": num_requests + 1, "rank_run": len(self.ranks)}
        sizes |= {dim: int(self.entries[dim].sum()) for dim in OFFSETS}
        sizes |= {f"{name}_byte": int(self.entries[name].sum()) for name in self.texts()}
        sizes |= {dim: size for dim, size in (("top", self.top), ("score_top", self.score_top)) if size}
        sizes["layer"], sizes["expert"] = len(self.moe_layers()), self.expert_load.shape[1]
        sizes["hosted"] = sum(len(experts) for record in self.ranks for experts in record.hosted.values())
        for table, traces in self.traces.items():
            sizes |= self._trace_sizes(table, traces)
        if self.has_statistics:
            sizes |= {"group": len(self._groups), "expert_beside": sizes["expert"]}
        return sizes

    def _trace_sizes(self, table: str, traces: TraceIndex) -> dict[str, int]:
        """The dimensions of a table and their sizes."""
        if table == "above":  # the number of its values is known once the latest rows are found
            return {"above_bound": int(self.table_rows(table).num_rows.sum()) + 1}
        sizes = {TABLE_LAYERS[table]: len(traces.layers)} if table in TABLE_LAYERS else {}
        for name, (_, shape) in traces.columns.items():
            rows, *others = TRACES[table][name].dims
            sizes[rows] = int(self.table_rows(table).num_rows.sum())
            sizes |= dict(zip(others[-len(shape) :] if shape else (), shape, strict=True))
        return sizes

    def _trace_bytes(self) -> int:
        """The size of the tables of all traces."""
        num_bytes = 0
        for table, traces in self.traces.items():
            if table == "above":
                num_bytes += traces.num_bytes + ITEM_BYTES * (int(self.table_rows(table).num_rows.sum()) + 1)
                continue
            row = sum(np.dtype(kind).itemsize * prod(shape) for kind, shape in traces.columns.values())
            num_bytes += int(self.table_rows(table).num_rows.sum()) * row * max(len(traces.layers), 1)
        if self.has_statistics:
            experts = self.expert_load.shape[1]
            num_sums = len(self._groups) * len(self.traces["routing"].layers) * experts * (experts + 3)
            num_bytes += ITEM_BYTES * num_sums
        return num_bytes

    def file_bytes(self) -> int:
        """An upper bound of the file's size."""
        sizes = self.sizes()
        arrays = sum(prod(sizes[dim] for dim in ARRAYS[name].dims) * ITEM_BYTES for name in self.arrays())
        texts = sum(2 * sizes[f"{name}_byte"] for name in self.texts())
        ranks = sum(len(record.host) + ITEM_BYTES * len(record.seconds) for record in self.ranks)
        ranks += 3 * ITEM_BYTES * sizes["hosted"]
        arrays += self._trace_bytes() + ITEM_BYTES * len(self.traces) * (len(self.entries) + MOST_LAYERS)
        entries = ENTRY_BYTES * (len(self.entries) + len(self.ranks))
        return arrays + texts + ranks + entries + 3 * self.expert_load.nbytes + METADATA_BYTES


def index_journals(journals: Journals, num_requests: int) -> JournalIndex:
    """Read all journals once; raises StorageError as `merge` does.

    A record that cannot be used, or contradicts others, is passed over and reported: it is no reason to end a job. Of
    several records of a request, the first of its latest attempt is used: the recorded routing is that attempt's too.
    """
    index = JournalIndex(np.zeros(num_requests, _ENTRY))
    index.entries["journal"] = -1
    for number in range(len(journals)):
        journal = journals.open(number)
        for offset, record in journal.records(num_requests=num_requests):
            try:
                if isinstance(record, RankRecord):
                    index.add_rank(record)
                elif isinstance(record, TraceRecord):
                    index.add_trace(record, journal=number, offset=offset)
                elif index.entries["journal"][record.index] < 0:
                    index.add_request(record, journal=number, offset=offset)
                else:
                    _add_again(index, record, journals, journal=number, offset=offset)
            except ValueError as error:
                journal.report(offset, f"that cannot be used: {error}")
        index.problems += journal.problems
    _require_all(index)
    return index


def _add_again(index: JournalIndex, record: RequestRecord, journals: Journals, *, journal: int, offset: int) -> None:
    """Add another record of a request if its attempt is a later one; report both if they differ in tokens."""
    entry = index.entries[record.index].copy()
    reader = journals.open(journal)  # before the other one, which then does not close it
    first = journals.request_at(entry)
    is_later = record.since > first.since
    if is_later:
        index.add_request(record, journal=journal, offset=offset)
    if not (np.array_equal(first.tokens, record.tokens) and np.array_equal(first.prompt, record.prompt)):
        other = f"{journals.open(int(entry['journal'])).path} at byte {entry['offset']}"
        used = "it" if is_later else "the latter"
        reader.report(offset, f"of request {record.index} with other tokens than in {other}, {used} is used")


def _require_all(index: JournalIndex) -> None:
    missing = np.flatnonzero(index.entries["journal"] < 0)
    if len(missing):
        counts = f"{len(missing)} of {len(index.entries)} requests have no record, the first is {missing[0]}"
        raise StorageError("; ".join([counts, *map(str, index.problems), "run the same job again to compute them"]))
