"""The results file, layout 1: written once, by merging the parts of all ranks, and read back by `ResultFile`.

Ragged rows lie one after another, with offsets. Text lies twice: exactly, as UTF-8 bytes with offsets, and as a string
dataset for people, where NUL, which HDF5 strings cannot hold, shows as U+2400. jobs/README.md has the table.
"""

import io
import shutil
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import msgspec
import numpy as np
from h5py import h5d, h5p
from numpy.typing import NDArray

from moempi.errors import DataError, StorageError
from moempi.storage.files import atomic, reserve
from moempi.storage.hdf5 import WRITE_VERSION, open_dataset, open_file, read_attribute, refusing, walk, write_attribute
from moempi.storage.records import Part, RankRecord, RequestRecord, parts_folder

FORMAT = "moempi results"
VERSION = 1
NO_TOKEN = -1
MAX_OPEN_PARTS = 64
BLOCK_BYTES = 4 << 20
ITEM_BYTES = 8
ENTRY_BYTES = 1024
METADATA_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where results come from: the job file's text, versions by package, ranks and hosts, the weights' fingerprint."""

    job: str
    versions: Mapping[str, str]
    world_size: int
    hosts: tuple[str, ...]
    weights: str
    start: datetime
    end: datetime


@dataclass(frozen=True, slots=True)
class _Array:
    """Where an array of a `RequestRecord` lies; all requests' rows follow each other along the first dimension."""

    path: str
    dtype: type[np.generic]
    dims: tuple[str, ...]
    long_name: str


@dataclass(frozen=True, slots=True)
class _Text:
    """Where a text of a `RequestRecord` lies: a string dataset, and a group of UTF-8 `values` and `offsets`."""

    readable: str
    exact: str
    long_name: str


_ARRAYS = {
    "prompt": _Array("prompt/tokens", np.int32, ("prompt_token",), "token ids of the prompts"),
    "tokens": _Array("output/tokens", np.int32, ("output_token",), "generated token ids"),
    "logprobs": _Array("output/logprobs", np.float32, ("output_token",), "log-probability of each generated token"),
    "top_tokens": _Array("output/top_tokens", np.int32, ("output_token", "top"), "likeliest token ids, -1 if fewer"),
    "top_logprobs": _Array("output/top_logprobs", np.float32, ("output_token", "top"), "their log-probabilities"),
    "score": _Array("score/logprobs", np.float32, ("prompt_token",), "log-probability of each prompt token"),
    "score_top_tokens": _Array("score/top_tokens", np.int32, ("prompt_token", "score_top"), "likeliest token ids"),
    "score_top_logprobs": _Array(
        "score/top_logprobs", np.float32, ("prompt_token", "score_top"), "their log-probabilities"
    ),
}
_TEXTS = {
    "id": _Text("requests/id", "requests/utf8/id", "id of the request"),
    "finish": _Text("requests/finish", "requests/utf8/finish", "why the request ended: stop, length or error"),
    "error": _Text("requests/error", "requests/utf8/error", "what went wrong, empty if nothing"),
    "reference": _Text("requests/reference", "requests/utf8/reference", "expected answer, empty if none was given"),
    "text": _Text("output/text/readable", "output/text", "generated text"),
}
_OFFSETS = {"prompt_token": "prompt/offsets", "output_token": "output/offsets"}
_ENTRY = np.dtype(
    [("part", "i4"), ("offset", "i8"), ("num_bytes", "i8"), ("prompt_token", "i8"), ("output_token", "i8")]
    + [(name, "i8") for name in _TEXTS]
)


def merge(results_path: str | Path, parts: Sequence[str | Path], *, num_requests: int, provenance: Provenance) -> None:
    """Write the results file from the parts of all ranks, atomically, then remove the folder of parts.

    Requests 0 to `num_requests` - 1 appear in this order; memory holds about 100 bytes per request and a few MiB. Call
    it on one rank, when all have closed their parts. Raises StorageError when a request is missing, when two records of
    one differ in tokens, when the parts are of different runs, or when the disk fails; the parts then stay.
    """
    with _Parts(parts) as opened:
        survey = _survey(opened, num_requests)
        try:
            Path(results_path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{results_path}: its folder cannot be made: {error.strerror}") from error
        with atomic(results_path) as temporary, _Output(temporary) as output:
            with h5py.File(output, "w", libver=WRITE_VERSION) as file:
                reserve(temporary, survey.file_bytes())
                _write_provenance(file, provenance)
                columns = _create_columns(file, survey)
                _write_ranks(file, survey)
                for start, stop in _blocks(survey.entries["num_bytes"]):
                    output.require_success()
                    records = [opened.request_at(entry) for entry in survey.entries[start:stop]]
                    for column in columns:
                        column.write(records)
            output.require_success()
    try:
        shutil.rmtree(parts_folder(results_path), ignore_errors=not parts)
    except OSError as error:
        raise StorageError(f"{results_path}: is complete, but its parts cannot be removed: {error}") from error


class ResultFile:
    """A results file opened for reading, through the guard.

    Raises NoInputError when it cannot be read and DataError when it is not a results file of layout 1.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._file = open_file(path)
        try:
            found = read_attribute(self._file, "format"), read_attribute(self._file, "version")
            if found != (FORMAT, VERSION):
                raise DataError(f"{path}: not a results file of layout {VERSION}: it says {found[0]}, {found[1]}")
            self._columns = self._open_columns()
            counts = {column.num_requests for column in self._columns.values()}
            if not self._columns.keys() >= {"id", "finish", "text"} or len(counts) != 1:
                raise DataError(f"{path}: its columns are missing or disagree about the number of requests")
            self.num_requests = counts.pop()
        except BaseException:
            self._file.close()
            raise

    def requests(self) -> Iterator[RequestRecord]:
        """Yield the requests in input order, a few MiB in memory at a time; DataError where the file is damaged."""
        num_bytes = sum(
            (column.num_bytes() for column in self._columns.values()), np.zeros(self.num_requests, np.int64)
        )
        for start, stop in _blocks(num_bytes):
            with refusing(self._path, f"requests {start} to {stop - 1}"):
                blocks = {name: column.read(start, stop) for name, column in self._columns.items()}
                records = [
                    _record(start + i, {name: rows[i] for name, rows in blocks.items()}) for i in range(stop - start)
                ]
            yield from records

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_columns(self) -> dict[str, "_Ragged"]:
        present = dict(walk(self._file))
        columns = {}
        for name, kind in _ARRAYS.items():
            if kind.path in present:
                offsets = _OFFSETS[kind.dims[0]]
                columns[name] = _Ragged(self._file, offsets, kind.path, np.dtype(kind.dtype), len(kind.dims))
        for name, text in _TEXTS.items():
            if text.exact in present:
                columns[name] = _Ragged(
                    self._file, f"{text.exact}/offsets", f"{text.exact}/values", np.dtype(np.uint8), 1
                )
        return columns


class _Ragged:
    """A dataset whose rows belong to requests, and the offsets that say which."""

    def __init__(self, file: Any, offsets: str, values: str, dtype: np.dtype[Any], num_dims: int) -> None:
        self._values = _checked(file, values, dtype, num_dims)
        self._offsets = _checked(file, offsets, np.dtype(np.int64), 1)[:]
        starts_and_ends = len(self._offsets) > 0 and self._offsets[0] == 0 and self._offsets[-1] == len(self._values)
        if not starts_and_ends or (np.diff(self._offsets) < 0).any():
            raise DataError(f"{file.filename}: {offsets}: do not divide the {len(self._values)} rows of {values}")
        self.num_requests = len(self._offsets) - 1

    def num_bytes(self) -> NDArray[np.int64]:
        """Bytes of each request."""
        row_bytes = self._values.dtype.itemsize * int(np.prod(self._values.shape[1:]))
        num_bytes: NDArray[np.int64] = np.diff(self._offsets) * row_bytes
        return num_bytes

    def read(self, start: int, stop: int) -> list[NDArray[Any]]:
        """The rows of each of the requests [start, stop)."""
        bounds = self._offsets[start : stop + 1]
        return np.split(self._values[bounds[0] : bounds[-1]], bounds[1:-1] - bounds[0])


class _Output(io.FileIO):
    """A file for HDF5 to write to, which keeps the first failure to itself.

    HDF5 that meets a full disk tries again when it closes the file and when the program ends, and dies of it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r+")
        self._failure: OSError | None = None

    def write(self, content: Any) -> int:
        """Write all of `content`, or from the first failure on nothing."""
        rest = memoryview(content).cast("B")
        num_bytes = len(rest)
        try:
            while rest and not self._failure:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._failure = error
        return num_bytes

    def truncate(self, size: int | None = None) -> int:
        """Set the file's size, unless writing has failed."""
        try:
            return self.tell() if self._failure else super().truncate(size)
        except OSError as error:
            self._failure = error
            return self.tell()

    def require_success(self) -> None:
        """Raise the OSError that was kept, if any."""
        if self._failure:
            raise self._failure


class _Parts:
    """All parts of a run, of which few are open at a time."""

    def __init__(self, paths: Sequence[str | Path]) -> None:
        self._paths = paths
        self._opened: OrderedDict[int, Part] = OrderedDict()
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._paths)

    def open(self, number: int) -> Part:
        """The part with this number; raises StorageError when it is of another run than those before it."""
        if number not in self._opened:
            if len(self._opened) == MAX_OPEN_PARTS:
                self._opened.popitem(last=False)[1].close()
            part = self._opened[number] = Part(self._paths[number])
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in self._opened.values():
            part.close()


@dataclass(slots=True)
class _Survey:
    """What the parts hold: for each request where its record lies and how long its fields are, and what ranks did."""

    entries: NDArray[Any]
    ranks: list[RankRecord] = field(default_factory=list)
    expert_load: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    top: int = 0
    score_top: int = 0
    scored: bool = False
    torn: list[str] = field(default_factory=list)

    def add_request(self, record: RequestRecord, *, part: int, offset: int) -> None:
        """Note a request that was not met before."""
        arrays = [getattr(record, name) for name in _ARRAYS]
        texts = [len((getattr(record, name) or "").encode()) for name in _TEXTS]
        num_bytes = sum(array.nbytes for array in arrays) + sum(texts)
        self.entries[record.index] = (part, offset, num_bytes, len(record.prompt), len(record.tokens), *texts)
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
        self.ranks.append(msgspec.structs.replace(record, expert_load=np.zeros((0, 0), np.int64)))

    def texts(self) -> list[str]:
        """The text columns to write; references only if any was given."""
        return [name for name in _TEXTS if name != "reference" or self.entries["reference"].any()]

    def arrays(self) -> list[str]:
        """The array columns to write: likeliest tokens and scores only if any were asked for."""
        dims = self.sizes()
        return [
            name
            for name, kind in _ARRAYS.items()
            if all(dim in dims for dim in kind.dims) and (self.scored or not name.startswith("score"))
        ]

    def sizes(self) -> dict[str, int]:
        """The dimensions of the file and their sizes."""
        num_requests = len(self.entries)
        sizes = {"request": num_requests, "request_bound": num_requests + 1, "rank_run": len(self.ranks)}
        sizes |= {dim: int(self.entries[dim].sum()) for dim in _OFFSETS}
        sizes |= {f"{name}_byte": int(self.entries[name].sum()) for name in self.texts()}
        sizes |= {dim: size for dim, size in (("top", self.top), ("score_top", self.score_top)) if size}
        sizes["layer"], sizes["expert"] = self.expert_load.shape
        return sizes

    def file_bytes(self) -> int:
        """An upper estimate of the file's size."""
        sizes = self.sizes()
        arrays = sum(prod(sizes[dim] for dim in _ARRAYS[name].dims) * ITEM_BYTES for name in self.arrays())
        texts = sum(2 * sizes[f"{name}_byte"] for name in self.texts())
        ranks = sum(len(record.host) + ITEM_BYTES * len(record.seconds) for record in self.ranks)
        entries = ENTRY_BYTES * (len(self.entries) + len(self.ranks))
        return arrays + texts + ranks + entries + self.expert_load.nbytes + METADATA_BYTES


class _Column:
    """A dataset that is written from front to back, with the rows that a function takes from each record."""

    def __init__(self, dataset: Any, rows_of: Callable[[RequestRecord], NDArray[Any]]) -> None:
        self._dataset = dataset
        self._rows_of = rows_of
        self._next_row = 0

    def write(self, records: Sequence[RequestRecord]) -> None:
        """Write the rows of the next records."""
        rows = np.concatenate([self._rows_of(record) for record in records])
        if len(rows):
            self._dataset[self._next_row : self._next_row + len(rows)] = rows
        self._next_row += len(rows)


def _survey(parts: _Parts, num_requests: int) -> _Survey:
    survey = _Survey(np.zeros(num_requests, _ENTRY))
    survey.entries["part"] = -1
    for number in range(len(parts)):
        part = parts.open(number)
        for offset, record in part.records():
            if isinstance(record, RankRecord):
                survey.add_rank(record)
            elif not 0 <= record.index < num_requests:
                raise StorageError(f"{part.path}: holds request {record.index}, the job has {num_requests}")
            elif survey.entries["part"][record.index] < 0:
                survey.add_request(record, part=number, offset=offset)
            else:
                _require_same(parts.request_at(survey.entries[record.index]), record, part.path)
        if part.dropped_bytes:
            survey.torn.append(f"{part.path} ends with {part.dropped_bytes} torn bytes")
    _require_all(survey)
    return survey


def _require_same(first: RequestRecord, again: RequestRecord, path: Path) -> None:
    if not (np.array_equal(first.tokens, again.tokens) and np.array_equal(first.prompt, again.prompt)):
        raise StorageError(f"{path}: request {again.index} ({again.id}) is recorded twice, with different tokens")


def _require_all(survey: _Survey) -> None:
    missing = np.flatnonzero(survey.entries["part"] < 0)
    if len(missing):
        counts = f"{len(missing)} of {len(survey.entries)} requests have no record, the first is {missing[0]}"
        raise StorageError("; ".join([counts, *survey.torn]))


def _write_provenance(file: Any, provenance: Provenance) -> None:
    attributes: dict[str, str | int] = {
        "format": FORMAT,
        "version": VERSION,
        "job": provenance.job,
        "versions": msgspec.json.encode(dict(provenance.versions)).decode(),
        "world_size": provenance.world_size,
        "hosts": msgspec.json.encode(tuple(dict.fromkeys(provenance.hosts))).decode(),
        "weights": provenance.weights,
        "start": provenance.start.isoformat(),
        "end": provenance.end.isoformat(),
    }
    for name, value in attributes.items():
        write_attribute(file, name, value)


def _create_columns(file: Any, survey: _Survey) -> list[_Column]:
    sizes = survey.sizes()
    for dim, size in sizes.items():
        _create_scale(file, dim, size)
    for dim, path in _OFFSETS.items():
        _write_offsets(file, path, survey.entries[dim])
    columns = []
    for name in survey.arrays():
        kind = _ARRAYS[name]
        dataset = _create(file, kind.path, kind.dtype, kind.dims, kind.long_name)
        columns.append(_Column(dataset, _rows_taker(name, width=sizes[kind.dims[1]] if kind.dims[1:] else None)))
    for name in survey.texts():
        text = _TEXTS[name]
        _write_offsets(file, f"{text.exact}/offsets", survey.entries[name])
        values = _create(file, f"{text.exact}/values", np.uint8, (f"{name}_byte",), f"{text.long_name}, UTF-8")
        readable = _create(file, text.readable, h5py.string_dtype(), ("request",), text.long_name)
        columns += [_Column(values, _bytes_taker(name)), _Column(readable, _readable_taker(name))]
    return columns


def _write_ranks(file: Any, survey: _Survey) -> None:
    load = _create(
        file, "experts/load", np.int64, ("layer", "expert"), "tokens routed to each expert of each MoE layer"
    )
    load[...] = survey.expert_load
    ranks = sorted(survey.ranks, key=lambda record: record.rank)
    dims = ("rank_run",)
    hosts = _create(file, "timing/host", h5py.string_dtype(), dims, "host of the rank")
    hosts[...] = [_readable(record.host) for record in ranks]
    names = {"rank": "rank", "steps": "steps taken", "tokens": "tokens generated or scored"}
    for name, long_name in names.items():
        dataset = _create(file, f"timing/{name}", np.int64, dims, long_name)
        dataset[...] = [getattr(record, name) for record in ranks]
    for phase in dict.fromkeys(phase for record in ranks for phase in record.seconds):
        seconds = _create(file, f"timing/{phase}", np.float64, dims, f"time of the rank in {phase}", units="s")
        seconds[...] = [record.seconds.get(phase, np.nan) for record in ranks]


def _write_offsets(file: Any, path: str, lengths: NDArray[np.int64]) -> None:
    dataset = _create(file, path, np.int64, ("request_bound",), "request i has rows offsets[i] to offsets[i + 1] - 1")
    dataset[...] = np.concatenate(([0], np.cumsum(lengths)))


def _create(file: Any, path: str, dtype: Any, dims: tuple[str, ...], long_name: str, *, units: str = "1") -> Any:
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    dataset = file.create_dataset(path, shape=tuple(file[dim].shape[0] for dim in dims), dtype=dtype, dcpl=creation)
    for axis, dim in enumerate(dims):
        dataset.dims[axis].attach_scale(file[dim])
    write_attribute(file, "long_name", long_name, owner=dataset.id)
    write_attribute(file, "units", units, owner=dataset.id)
    return dataset


def _create_scale(file: Any, dim: str, size: int) -> None:
    # The netCDF convention for a dimension that has no coordinates; the request's index is one that has.
    name = f"This is a netCDF dimension but not a netCDF variable. {size:9d}"
    if dim == "request":
        file.create_dataset(dim, data=np.arange(size)).make_scale(dim)
    else:
        file.create_dataset(dim, shape=(size,), dtype=np.uint8).make_scale(name)


def _rows_taker(name: str, *, width: int | None) -> Callable[[RequestRecord], NDArray[Any]]:
    kind = _ARRAYS[name]
    fill = NO_TOKEN if kind.dtype is np.int32 else np.nan

    def take(record: RequestRecord) -> NDArray[Any]:
        array: NDArray[Any] = getattr(record, name)
        num_rows = len(record.prompt if kind.dims[0] == "prompt_token" else record.tokens)
        shape = (num_rows,) if width is None else (num_rows, width)
        if array.shape == shape:
            return array
        rows = np.full(shape, fill, kind.dtype)
        rows[tuple(slice(size) for size in array.shape)] = array
        return rows

    return take


def _bytes_taker(name: str) -> Callable[[RequestRecord], NDArray[Any]]:
    return lambda record: np.frombuffer((getattr(record, name) or "").encode(), np.uint8)


def _readable_taker(name: str) -> Callable[[RequestRecord], NDArray[Any]]:
    return lambda record: np.array([_readable(getattr(record, name) or "")], object)


def _readable(text: str) -> str:
    return text.replace("\0", "\u2400")


def _blocks(num_bytes: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Divide requests of these sizes into ranges [start, stop) of at most BLOCK_BYTES, or one larger request."""
    # A request without any bytes still costs its bookkeeping.
    ends = np.cumsum(num_bytes + 256)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + BLOCK_BYTES, side="right")))
        yield start, stop
        start = stop


def _checked(file: Any, path: str, dtype: np.dtype[Any], num_dims: int) -> Any:
    dataset = h5py.Dataset(open_dataset(file, path))
    if dataset.dtype != dtype or dataset.ndim != num_dims:
        raise DataError(
            f"{file.filename}: {path}: is {dataset.dtype} {dataset.shape}, not {dtype} with {num_dims} axes"
        )
    return dataset


def _record(index: int, columns: dict[str, NDArray[Any]]) -> RequestRecord:
    fields: dict[str, Any] = {}
    for name, rows in columns.items():
        fields[name] = rows.tobytes().decode() if name in _TEXTS else rows
    for tokens, logprobs in (("top_tokens", "top_logprobs"), ("score_top_tokens", "score_top_logprobs")):
        if tokens in fields:
            width = int((fields[tokens] != NO_TOKEN).any(axis=0).sum())
            for name in (tokens, logprobs):
                fields[name] = fields[name][:, :width] if width else fields[name][:0, :0]
    fields["reference"] = fields.get("reference") or None
    return RequestRecord(index=index, **fields)
