"""Merge of values at positions into the results file: one row for each recorded position of each request.

The next attempt at a job computes an interrupted request again, and its rows replace the rows of the earlier attempt.
Rows are therefore written in the order of the attempts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from moempi.storage.hdf5 import FILE_TYPES, write_rows
from moempi.storage.journal_index import JournalIndex, Journals, TableRows, TraceIndex, trace_blocks
from moempi.storage.merge_above import write_above
from moempi.storage.records import TraceRecord
from moempi.storage.results_columns import create, write_offsets
from moempi.storage.results_layout import HOME, SCORES, TABLE_LAYERS, TRACES, TraceColumn, missing_value, ranges

Rows = dict[str, NDArray[Any]]
"""Columns of a table by name, all with the same number of rows."""


def write_traces(file: Any, journals: Journals, index: JournalIndex, require_success: Callable[[], None]) -> int:
    """Write the tables of all trace records. Raises StorageError.

    Memory holds a few blocks of BLOCK_BYTES, and a bit for each row. Returns the number of requests whose
    latest attempt lacks rows of a table in any of its layers.
    """
    is_whole = np.ones(len(index.entries), np.bool_)
    for table, traces in index.traces.items():
        table_rows = index.table_rows(table)
        num_rows = np.maximum(table_rows.end - 1, 0) if table in SCORES else table_rows.num_rows
        if table == "above":
            is_whole &= write_above(file, journals, index, require_success) >= num_rows
            continue
        columns = _create_columns(file, table, traces, table_rows)
        num_written = np.zeros(len(index.entries), np.int64)
        for group in traces.groups():  # each of one attempt and of one set of layers
            row_set = _RowSet(int(table_rows.num_rows.sum()))
            for records in trace_blocks(journals.trace_at(journal, offset) for journal, offset in group):
                require_success()
                rows = _sorted_rows(_joined(records), table_rows)
                _write(columns, rows, [traces.layers.index(layer) for layer in records[0].layers] or [0])
                is_latest = index.entries["since"][rows["request"]] == records[0].since
                is_new = row_set.add(rows["file_row"][is_latest])
                np.add.at(num_written, rows["request"][is_latest][is_new], max(len(records[0].layers), 1))
        is_whole &= num_written >= num_rows * max(len(traces.layers), 1)
    return int((~is_whole).sum())


class _RowSet:
    """A set of rows of the file, a bit each: a row counts once, however many records have it."""

    def __init__(self, num_rows: int) -> None:
        self._bits = np.zeros(-(-num_rows // 8), np.uint8)

    def add(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Add ascending rows (T,); whether each was not there before (T,)."""
        places, bits = rows >> 3, (1 << (rows & 7)).astype(np.uint8)
        is_new: NDArray[np.bool_] = (self._bits[places] & bits) == 0
        is_new[1:] &= np.diff(rows) != 0
        np.bitwise_or.at(self._bits, places, bits)
        return is_new


class _Column:
    """A dataset of rows, or of rows and layers."""

    def __init__(self, file: Any, column: TraceColumn, dtype: np.dtype[Any]) -> None:
        self.has_layers = column.dims[1:2] == (TABLE_LAYERS["routing"],)
        missing = missing_value(dtype)
        self._dataset = create(file, column.path, dtype, column.dims, column.long_name, fill_value=missing)

    def write(self, rows: slice, layers: slice, values: NDArray[Any]) -> None:
        """Write the values (T, ...) of a range of rows or, if it has layers, (T, L, ...) of a range of layers."""
        self._dataset[(rows, layers) if self.has_layers else rows] = values


class _LayerColumns:
    """A dataset of rows for each layer, in which the rows of a request are together; bfloat16 is given as its bits."""

    has_layers = True

    def __init__(self, file: Any, column: TraceColumn, dtype: np.dtype[Any], layers: Sequence[int]) -> None:
        self._type = "bfloat16" if dtype == np.uint16 else "float32"
        kind = h5py.Datatype(FILE_TYPES[self._type])
        rows, _, *others = column.dims
        self._datasets = [
            create(file, f"{column.path}/{layer:03}", kind, (rows, *others), column.long_name, fill_value=np.nan)
            for layer in layers
        ]

    def write(self, rows: slice, layers: slice, values: NDArray[Any]) -> None:
        """Write the values (T, L, ...) of a range of rows and layers."""
        for number, dataset in enumerate(self._datasets[layers]):
            write_rows(dataset.id, rows.start, values[:, number], dtype=self._type)


def _create_columns(
    file: Any, table: str, traces: TraceIndex, table_rows: TableRows
) -> dict[str, _Column | _LayerColumns]:
    """The datasets of the columns that were recorded, and what says to whom their rows and layers belong."""
    if table in TABLE_LAYERS:
        write_offsets(file, f"{table}/offsets", table_rows.num_rows)
        layers = create(file, f"{table}/layer", np.int32, (TABLE_LAYERS[table],), "layer of the model")
        layers[...] = traces.layers
    if table == "hidden":
        create(file, "hidden/first", np.int32, ("request",), "position of the first row")[...] = table_rows.first
    columns: dict[str, _Column | _LayerColumns] = {}
    for name, column in TRACES[table].items():
        if name in traces.columns:
            dtype = np.dtype(traces.columns[name][0])
            in_layers = table == "hidden"
            columns[name] = (
                _LayerColumns(file, column, dtype, traces.layers) if in_layers else _Column(file, column, dtype)
            )
    return columns


def _sorted_rows(rows: Rows, table_rows: TableRows) -> Rows:
    """Rows sorted by their `file_row`; drops positions that the request does not have in the end."""
    requests, numbers = rows["request"], rows["position"] - table_rows.first[rows["request"]]
    file_rows = (np.cumsum(table_rows.num_rows) - table_rows.num_rows)[requests] + numbers
    order = np.argsort(file_rows, kind="stable")
    is_recorded = (numbers >= 0) & (rows["position"] < table_rows.end[requests])
    order = order[is_recorded[order]]
    return {name: column[order] for name, column in (rows | {"file_row": file_rows}).items()}


def _write(columns: Mapping[str, _Column | _LayerColumns], rows: Rows, layers: Sequence[int]) -> None:
    """Write rows with ascending `file_row` to these layers of the file, each contiguous range at once."""
    for source, target in ranges(rows["file_row"]):
        for of_rows, of_file in ranges(np.array(layers)):
            for name, column in columns.items():
                values = rows[name][source]
                column.write(target, of_file, values[:, of_rows] if column.has_layers else values)


def _joined(records: list[TraceRecord]) -> Rows:
    """The concatenated rows of records of the same layers and columns."""
    rows: Rows = {
        "request": np.concatenate([record.requests for record in records]),
        "position": np.concatenate([record.positions for record in records]).astype(np.int64),
    }
    axis = int(records[0].table in TABLE_LAYERS)
    for name in records[0].columns:
        joined = np.concatenate([record.columns[name] for record in records], axis=axis)
        rows[name] = joined.swapaxes(0, axis)
    return rows | (_home(records) if records[0].home else {})


def _home(records: list[TraceRecord]) -> Rows:
    """The columns HOME of the rows of records of the same layers."""
    lengths, num_layers = [len(record.requests) for record in records], len(records[0].layers)
    step = np.repeat(np.array([record.step for record in records], np.int64), lengths)
    rank = np.repeat(np.array([record.rank for record in records], np.int32), lengths)
    row = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    of_layers = [np.repeat(values[:, None], num_layers, axis=1) for values in (rank, row)]
    return dict(zip(HOME, (step, *of_layers), strict=True))
