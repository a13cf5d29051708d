"""Merge of values at positions into the results file: one row for each recorded position of each request.

The next attempt at a job computes an interrupted request again, and its rows replace the rows of the earlier attempt.
Rows are therefore written in the order of the attempts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moempi.storage.journal_index import JournalIndex, Journals, TableRows, TraceIndex
from moempi.storage.records import TraceRecord
from moempi.storage.results_columns import create, write_offsets
from moempi.storage.results_layout import HOME, TABLE_LAYERS, TRACES, missing_value

BLOCK_BYTES = 16 << 20

Rows = dict[str, NDArray[Any]]
"""Columns of a table by name, all with the same number of rows."""


def write_traces(file: Any, journals: Journals, index: JournalIndex, require_success: Callable[[], None]) -> None:
    """Write the tables of all trace records; memory holds a few blocks of BLOCK_BYTES. Raises StorageError."""
    for table, traces in index.traces.items():
        places = index.table_rows(table)
        columns = _create_columns(file, table, traces, places)
        for group in traces.groups():
            for records in _blocks(journals.trace_at(journal, offset) for journal, offset in group):
                require_success()
                rows = _sorted_rows(_joined(records), places)
                _write(columns, rows, [traces.layers.index(layer) for layer in records[0].layers])


def _create_columns(file: Any, table: str, traces: TraceIndex, places: TableRows) -> dict[str, Any]:
    """The datasets of the columns that were recorded, and what says to whom their rows and layers belong."""
    write_offsets(file, f"{table}/offsets", places.num_rows)
    layers = create(file, f"{table}/layer", np.int32, (TABLE_LAYERS[table],), "layer of the model")
    layers[...] = traces.layers
    columns = {}
    for name, column in TRACES[table].items():
        if name in traces.columns:
            dtype = np.dtype(traces.columns[name][0])
            columns[name] = create(
                file, column.path, dtype, column.dims, column.long_name, fill_value=missing_value(dtype)
            )
    return columns


def _sorted_rows(rows: Rows, places: TableRows) -> Rows:
    """Rows sorted by their `file_row`; drops positions that the request does not have in the end."""
    requests, numbers = rows["request"], rows["position"] - places.first[rows["request"]]
    file_rows = (np.cumsum(places.num_rows) - places.num_rows)[requests] + numbers
    order = np.argsort(file_rows)
    order = order[(numbers[order] >= 0) & (numbers[order] < places.num_rows[requests[order]])]
    return {name: column[order] for name, column in (rows | {"file_row": file_rows}).items()}


def _write(columns: Mapping[str, Any], rows: Rows, layers: Sequence[int]) -> None:
    """Write rows with ascending `file_row` to these layers of the file, each contiguous range at once."""
    for source, target in _ranges(rows["file_row"]):
        for name, dataset in columns.items():
            if dataset.ndim == 1:
                dataset[target] = rows[name][source]
                continue
            for of_rows, of_file in _ranges(np.array(layers)):
                dataset[target, of_file] = rows[name][source, of_rows]


def _ranges(indices: NDArray[np.int64]) -> Iterator[tuple[slice, slice]]:
    """Yield the places of consecutive ascending `indices`, and the range that they are."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    for first, last in pairwise([0, *breaks.tolist(), len(indices)]):
        if first < last:
            yield slice(first, last), slice(int(indices[first]), int(indices[last - 1]) + 1)


def _blocks(records: Iterable[TraceRecord]) -> Iterator[list[TraceRecord]]:
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


def _joined(records: list[TraceRecord]) -> Rows:
    """The concatenated rows of records of the same layers and columns."""
    rows: Rows = {
        "request": np.concatenate([record.requests for record in records]),
        "position": np.concatenate([record.positions for record in records]).astype(np.int64),
    }
    for name in records[0].columns:
        rows[name] = np.concatenate([record.columns[name] for record in records], axis=1).swapaxes(0, 1)
    return rows | (_home(records) if records[0].home else {})


def _home(records: list[TraceRecord]) -> Rows:
    """The columns HOME of the rows of records of the same layers."""
    lengths, num_layers = [len(record.requests) for record in records], len(records[0].layers)
    step = np.repeat(np.array([record.step for record in records], np.int64), lengths)
    rank = np.repeat(np.array([record.rank for record in records], np.int32), lengths)
    row = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    of_layers = [np.repeat(values[:, None], num_layers, axis=1) for values in (rank, row)]
    return dict(zip(HOME, (step, *of_layers), strict=True))
