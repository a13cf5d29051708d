"""Atomic merge of the journals of all ranks into one results file (HDF5)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import h5py
import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from moempi.errors import StorageError
from moempi.storage.expert_statistics import write_statistics
from moempi.storage.files import atomic, reserve
from moempi.storage.hdf5 import create_file, write_attribute
from moempi.storage.journal import Problem
from moempi.storage.journal_index import JournalIndex, Journals, index_journals
from moempi.storage.merge_traces import write_traces
from moempi.storage.records import RankRecord, RequestRecord
from moempi.storage.results_columns import create, create_scale, write_offsets
from moempi.storage.results_layout import (
    ARRAYS,
    FORMAT,
    HOSTED,
    NO_TOKEN,
    NOWHERE,
    OFFSETS,
    RANK_POSITION,
    SECONDS,
    TEXTS,
    VERSION,
    blocks,
)


class Provenance(Struct, frozen=True):
    """Provenance of results: text of the job file, package versions, ranks and hosts, fingerprint of the weights.

    `fast_products` says whether `run.products = "fast"` was in effect.
    """

    job: str
    versions: Mapping[str, str]
    world_size: int
    hosts: tuple[str, ...]
    weights: str
    fast_products: bool
    start: datetime
    end: datetime


def merge(
    results_path: str | Path,
    journals: Sequence[str | Path],
    *,
    num_requests: int,
    provenance: Provenance,
    before_replace: Callable[[Path], object] = lambda file: None,
) -> list[Problem]:
    """Write the results file atomically from the journals of all ranks; keeps the journals.

    Returns the problems of journals: damage, a torn end, a record that cannot be used, two records of a request that
    differ in tokens; and one that counts the requests that lack recorded rows. Requests are in the order 0 to
    `num_requests` - 1. Memory holds about 100 bytes per request and a few MiB. Call this on one rank, after all ranks
    have closed their journals. Calls `before_replace` with the path of the new file, which is whole on disk and not yet
    in place; if that raises, an earlier results file stays. Raises StorageError if a request is missing, if the
    journals are from different runs, or if the disk fails.
    """
    with Journals(journals) as opened:
        index = index_journals(opened, num_requests)
        try:
            Path(results_path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{results_path}: its folder cannot be made: {error.strerror}") from error
        placing = atomic(results_path, before_replace=before_replace)
        with placing as temporary, create_file(temporary) as (file, require_success):
            reserve(temporary, index.file_bytes())
            _write_provenance(file, provenance)
            columns = _create_columns(file, index)
            _write_ranks(file, index)
            num_untraced = write_traces(file, opened, index, require_success)
            if index.has_statistics:
                write_statistics(file, index, require_success)
            for start, stop in blocks(index.entries["num_bytes"]):
                require_success()
                records = [opened.request_at(entry) for entry in index.entries[start:stop]]
                for column in columns:
                    column.write(records)
        if num_untraced:
            sentence = f"{results_path}: {num_untraced} of {num_requests} requests lack recorded rows"
            index.problems.append(Problem(Path(results_path), 0, sentence))
        return index.problems


class _Column:
    """A dataset that is written sequentially; `rows_of` extracts a record's rows."""

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


def _write_provenance(file: Any, provenance: Provenance) -> None:
    attributes: dict[str, str | int] = {
        "format": FORMAT,
        "version": VERSION,
        "job": provenance.job,
        "versions": msgspec.json.encode(dict(provenance.versions)).decode(),
        "world_size": provenance.world_size,
        "hosts": msgspec.json.encode(tuple(dict.fromkeys(provenance.hosts))).decode(),
        "weights": provenance.weights,
        "fast_products": int(provenance.fast_products),
        "start": provenance.start.isoformat(),
        "end": provenance.end.isoformat(),
    }
    for name, value in attributes.items():
        write_attribute(file, name, value)


def _create_columns(file: Any, index: JournalIndex) -> list[_Column]:
    sizes = index.sizes()
    for dim, size in sizes.items():
        create_scale(file, dim, size)
    for dim, path in OFFSETS.items():
        write_offsets(file, path, index.entries[dim])
    columns = []
    for name in index.arrays():
        kind = ARRAYS[name]
        dataset = create(file, kind.path, kind.dtype, kind.dims, kind.long_name)
        columns.append(_Column(dataset, _row_extractor(name, width=sizes[kind.dims[1]] if kind.dims[1:] else None)))
    for name in index.texts():
        text = TEXTS[name]
        write_offsets(file, f"{text.exact}/offsets", index.entries[name])
        values = create(file, f"{text.exact}/values", np.uint8, (f"{name}_byte",), f"{text.long_name}, UTF-8")
        readable = create(file, text.readable, h5py.string_dtype(), ("request",), text.long_name)
        columns += [_Column(values, _byte_extractor(name)), _Column(readable, _readable_extractor(name))]
    for name, duration in SECONDS.items():
        seconds = create(file, duration.path, np.float64, ("request",), duration.long_name, units="s")
        columns.append(_Column(seconds, _seconds_extractor(name)))
    return columns


def _write_ranks(file: Any, index: JournalIndex) -> None:
    dims = ("layer", "expert")
    layers = index.moe_layers()
    create(file, "experts/layer", np.int32, dims[:1], "MoE layers of the model")[...] = layers
    load = create(file, "experts/load", np.int64, dims, "tokens routed to each expert of each MoE layer")
    load[...] = index.expert_load[layers]
    if index.asked_load.size:
        asked_load = create(file, "experts/asked_load", np.int64, dims, "tokens that routers asked it for")
        asked_load[...] = index.asked_load[layers]
        shifts = create(file, "experts/shift", np.float32, dims, "term on its score at the end")
        shifts[...] = index.shifts[layers]
    ranks = sorted(index.ranks, key=lambda record: record.rank)
    _write_timing(file, ranks)
    for name in _keys(record.balance for record in ranks):
        figures = create(file, f"balance/{name}", np.float64, ("rank_run",), name.replace("_", " "))
        figures[...] = [record.balance.get(name, np.nan) for record in ranks]
    for name in _keys(record.replay for record in ranks):
        counts = create(file, f"replay/{name}", np.int64, ("rank_run",), f"{name} of the routing that was given")
        counts[...] = [record.replay.get(name, 0) for record in ranks]
    _write_placement(file, ranks)
    for name in _keys(record.counters for record in ranks):
        units, long_name = "B" if name.endswith("_bytes") else "1", f"{name.replace('_', ' ')} sent"
        counts = create(file, f"network/{name}", np.int64, ("rank_run",), long_name, units=units)
        counts[...] = [record.counters.get(name, 0) for record in ranks]


def _write_timing(file: Any, ranks: Sequence[RankRecord]) -> None:
    dims = ("rank_run",)
    hosts = create(file, "timing/host", h5py.string_dtype(), dims, "host of the rank")
    hosts[...] = [_readable(record.host) for record in ranks]
    names = {"rank": "rank", "steps": "steps taken", "tokens": "tokens generated or scored"}
    for name, long_name in names.items():
        create(file, f"timing/{name}", np.int64, dims, long_name)[...] = [getattr(record, name) for record in ranks]
    for phase in _keys(record.seconds for record in ranks):
        seconds = create(file, f"timing/{phase}", np.float64, dims, f"time of the rank in {phase}", units="s")
        seconds[...] = [record.seconds.get(phase, np.nan) for record in ranks]
    num_bytes = create(file, "loading/bytes", np.int64, dims, "weights that the rank read", units="B")
    num_bytes[...] = [record.loaded_bytes for record in ranks]
    seconds = create(file, "loading/seconds", np.float64, dims, "time until they were on the rank's machine", units="s")
    seconds[...] = [record.loading_s for record in ranks]


def _write_placement(file: Any, ranks: Sequence[RankRecord]) -> None:
    for name in _keys(record.place for record in ranks):
        long_name = RANK_POSITION.get(name, name)
        coordinates = create(file, f"placement/{name}", np.int64, ("rank_run",), long_name, fill_value=NOWHERE)
        coordinates[...] = [record.place.get(name, NOWHERE) for record in ranks]
    hosted = [
        (row, layer, expert)
        for row, record in enumerate(ranks)
        for layer, experts in sorted(record.hosted.items())
        for expert in experts
    ]
    for column, (name, long_name) in enumerate(HOSTED.items()):
        values = create(file, f"placement/hosted/{name}", np.int32, ("hosted",), long_name)
        values[...] = [entry[column] for entry in hosted]


def _keys(mappings: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """All keys of the mappings, in the order of their first appearance."""
    return dict.fromkeys(key for mapping in mappings for key in mapping)


def _row_extractor(name: str, *, width: int | None) -> Callable[[RequestRecord], NDArray[Any]]:
    kind = ARRAYS[name]
    fill_value = NO_TOKEN if kind.dtype is np.int32 else np.nan

    def extract(record: RequestRecord) -> NDArray[Any]:
        array: NDArray[Any] = getattr(record, name)
        num_rows = len(record.prompt if kind.dims[0] == "prompt_token" else record.tokens)
        shape = (num_rows,) if width is None else (num_rows, width)
        if array.shape == shape:
            return array
        rows = np.full(shape, fill_value, kind.dtype)
        if array.size:
            rows[tuple(slice(size) for size in array.shape)] = array
        return rows

    return extract


def _byte_extractor(name: str) -> Callable[[RequestRecord], NDArray[Any]]:
    return lambda record: np.frombuffer((getattr(record, name) or "").encode(), np.uint8)


def _readable_extractor(name: str) -> Callable[[RequestRecord], NDArray[Any]]:
    return lambda record: np.array([_readable(getattr(record, name) or "")], object)


def _seconds_extractor(name: str) -> Callable[[RequestRecord], NDArray[Any]]:
    return lambda record: np.array([getattr(record, name)], np.float64)  # None becomes NaN


def _readable(text: str) -> str:
    return text.replace("\0", "\u2400")
