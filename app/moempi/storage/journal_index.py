"""A survey of the parts before the merge: where each request's record lies, its length, and that none is missing."""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from moempi.errors import StorageError
from moempi.storage.journal import JournalReader
from moempi.storage.records import RankRecord, RequestRecord, RoutingRecord
from moempi.storage.results_layout import ARRAYS, OFFSETS, TEXTS

MAX_OPEN_JOURNALS = 64
ITEM_BYTES = 8
ENTRY_BYTES = 1024
METADATA_BYTES = 256 << 10

NO_LOAD, NO_SHIFTS = np.zeros((0, 0), np.int64), np.zeros((0, 0), np.float32)

_ENTRY = np.dtype(
    [("part", "i4"), ("offset", "i8"), ("num_bytes", "i8"), ("prompt_token", "i8"), ("output_token", "i8")]
    + [("computed", "i8")]
    + [(name, "i8") for name in TEXTS]
)


class Journals:
    """All parts of a run, of which few are open at a time."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = paths
        self._opened: OrderedDict[int, JournalReader] = OrderedDict()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, number: int) -> JournalReader:
        """The part with this number; raises StorageError when it is of another run than those before it."""
        if number not in self._opened:
            if len(self._opened) == MAX_OPEN_JOURNALS:
                self._opened.popitem(last=False)[1].close()
            part = self._opened[number] = JournalReader(self._paths[number])
            self._fingerprint = self._fingerprint or part.fingerprint
            if part.fingerprint != self._fingerprint:
                raise StorageError(f"{part.path}: belongs to another run than {self._paths[0]}")
        self._opened.move_to_end(number)
        return self._opened[number]

    def request_at(self, entry: Any) -> RequestRecord:
        """The record that an entry of the survey points to."""
        part = self.open(int(entry["part"]))
        record = part.record_at(int(entry["offset"]))
        if not isinstance(record, RequestRecord):
            raise StorageError(f"{part.path}: the record at byte {entry['offset']} has changed since it was found")
        return record

    def routing_at(self, journal: int, offset: int) -> RoutingRecord:
        """The record of routing that lies there."""
        opened = self.open(journal)
        record = opened.record_at(offset)
        if not isinstance(record, RoutingRecord):
            raise StorageError(f"{opened.path}: the record at byte {offset} has changed since it was found")
        return record

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._opened.values():
            part.close()


class RoutingIndex:
    """Where the records of routing lie, 40 bytes each: attempt, which layers, step, part and offset.

    `top_k` is the number of experts of a token, 0 where nothing is recorded.
    """

    def __init__(self) -> None:
        self.top_k = 0
        self._layer_sets: dict[tuple[int, ...], int] = {}
        self._entries = array("q")

    @property
    def layers(self) -> list[int]:
        """The layers of which anything is recorded, ascending."""
        return sorted({layer for layers in self._layer_sets for layer in layers})

    def add(self, record: RoutingRecord, *, journal: int, offset: int) -> None:
        """Note one record."""
        layers = self._layer_sets.setdefault(record.layers, len(self._layer_sets))
        self._entries.extend((record.since, layers, record.step, journal, offset))
        self.top_k = record.experts.shape[2]

    def groups(self) -> Iterator[list[tuple[int, int]]]:
        """Part and offset of the records of one attempt and the same layers, step by step; later attempts later."""
        places = np.frombuffer(self._entries, np.int64).reshape(-1, 5)
        places = places[np.lexsort(places[:, 2::-1].T)]
        for group in np.split(places, np.flatnonzero(np.diff(places[:, :2], axis=0).any(axis=1)) + 1):
            yield [(part, offset) for part, offset in group[:, 3:].tolist()]


@dataclass(slots=True)
class JournalIndex:
    """What the parts hold: for each request where its record lies and how long its fields are, and what ranks did."""

    entries: NDArray[Any]
    ranks: list[RankRecord] = field(default_factory=list)
    expert_load: NDArray[np.int64] = field(default_factory=lambda: NO_LOAD)
    asked_load: NDArray[np.int64] = field(default_factory=lambda: NO_LOAD)
    shifts: NDArray[np.float32] = field(default_factory=lambda: NO_SHIFTS)
    top: int = 0
    score_top: int = 0
    scored: bool = False
    torn: list[str] = field(default_factory=list)
    routing: RoutingIndex = field(default_factory=RoutingIndex)

    def add_request(self, record: RequestRecord, *, journal: int, offset: int) -> None:
        """Note a request that was not met before."""
        arrays = [getattr(record, name) for name in ARRAYS]
        texts = [len((getattr(record, name) or "").encode()) for name in TEXTS]
        num_bytes = sum(array.nbytes for array in arrays) + sum(texts)
        lengths = len(record.prompt), len(record.tokens), record.computed
        self.entries[record.index] = (journal, offset, num_bytes, *lengths, *texts)
        self.top = max(self.top, record.top_tokens.shape[1])
        self.score_top = max(self.score_top, record.score_top_tokens.shape[1])
        self.scored = self.scored or len(record.score) > 0

    def add_rank(self, record: RankRecord) -> None:
        """Add up one rank's expert loads and keep the rest."""
        if not self.ranks:
            self.expert_load = np.zeros_like(record.expert_load)
        if record.expert_load.shape != self.expert_load.shape:
            raise StorageError(
                f"rank {record.rank} counted experts as {record.expert_load.shape}, others as {self.expert_load.shape}"
            )
        self.expert_load += record.expert_load
        if record.asked_load.size:
            self.asked_load = self.asked_load + record.asked_load if self.asked_load.size else record.asked_load
            self.shifts = self.shifts + record.shifts if self.shifts.size else record.shifts
        nothing = {"expert_load": NO_LOAD, "asked_load": NO_LOAD, "shifts": NO_SHIFTS}
        self.ranks.append(msgspec.structs.replace(record, **nothing))

    def add_routing(self, record: RoutingRecord, *, journal: int, offset: int) -> None:
        """Note where the routing of one rank's step lies."""
        self.routing.add(record, journal=journal, offset=offset)

    def texts(self) -> list[str]:
        """The text columns to write; references only if any was given."""
        return [name for name in TEXTS if name != "reference" or self.entries["reference"].any()]

    def arrays(self) -> list[str]:
        """The array columns to write: likeliest tokens and scores only if any were asked for."""
        dims = self.sizes()
        return [
            name
            for name, kind in ARRAYS.items()
            if all(dim in dims for dim in kind.dims) and (self.scored or not name.startswith("score"))
        ]

    def sizes(self) -> dict[str, int]:
        """The dimensions of the file and their sizes."""
        num_requests = len(self.entries)
        sizes = {"request": num_requests, "request_bound": num_requests + 1, "rank_run": len(self.ranks)}
        sizes |= {dim: int(self.entries[dim].sum()) for dim in OFFSETS}
        sizes |= {f"{name}_byte": int(self.entries[name].sum()) for name in self.texts()}
        sizes |= {dim: size for dim, size in (("top", self.top), ("score_top", self.score_top)) if size}
        sizes["layer"], sizes["expert"] = self.expert_load.shape
        sizes["hosted"] = sum(len(experts) for record in self.ranks for experts in record.hosted.values())
        if self.routing.top_k:
            sizes["routed_token"] = int(self.entries["computed"].sum())
            sizes["routed_layer"], sizes["slot"] = len(self.routing.layers), self.routing.top_k
        return sizes

    def file_bytes(self) -> int:
        """An upper estimate of the file's size."""
        sizes = self.sizes()
        arrays = sum(prod(sizes[dim] for dim in ARRAYS[name].dims) * ITEM_BYTES for name in self.arrays())
        texts = sum(2 * sizes[f"{name}_byte"] for name in self.texts())
        ranks = sum(len(record.host) + ITEM_BYTES * len(record.seconds) for record in self.ranks)
        ranks += 3 * ITEM_BYTES * sizes["hosted"]
        if self.routing.top_k:
            choices = sizes["routed_token"] * sizes["routed_layer"] * (1 + sizes["slot"])
            arrays += ITEM_BYTES * (choices + 2 * sizes["routed_token"])
        entries = ENTRY_BYTES * (len(self.entries) + len(self.ranks))
        return arrays + texts + ranks + entries + 3 * self.expert_load.nbytes + METADATA_BYTES


def index_journals(journals: Journals, num_requests: int) -> JournalIndex:
    """Read all parts once; raises StorageError as `merge` says."""
    survey = JournalIndex(np.zeros(num_requests, _ENTRY))
    survey.entries["part"] = -1
    for number in range(len(journals)):
        part = journals.open(number)
        for offset, record in part.records():
            if isinstance(record, RankRecord):
                survey.add_rank(record)
            elif isinstance(record, RoutingRecord):
                survey.add_routing(record, journal=number, offset=offset)
            elif not 0 <= record.index < num_requests:
                raise StorageError(f"{part.path}: holds request {record.index}, the job has {num_requests}")
            elif survey.entries["part"][record.index] < 0:
                survey.add_request(record, journal=number, offset=offset)
            else:
                _require_same(journals.request_at(survey.entries[record.index]), record, part.path)
        if part.dropped_bytes:
            survey.torn.append(f"{part.path} ends with {part.dropped_bytes} torn bytes")
    _require_all(survey)
    return survey


def _require_same(first: RequestRecord, again: RequestRecord, path: Path) -> None:
    if not (np.array_equal(first.tokens, again.tokens) and np.array_equal(first.prompt, again.prompt)):
        raise StorageError(f"{path}: request {again.index} ({again.id}) is recorded twice, with different tokens")


def _require_all(index: JournalIndex) -> None:
    missing = np.flatnonzero(index.entries["part"] < 0)
    if len(missing):
        counts = f"{len(missing)} of {len(index.entries)} requests have no record, the first is {missing[0]}"
        raise StorageError("; ".join([counts, *index.torn]))
