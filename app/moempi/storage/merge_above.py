"""Merge of the tokens above a threshold: for each scored position, as many as there are.

The rows of a request come from its latest attempt alone; of several records of a row, the last is used. The lengths of
rows are written first, in the place of the offsets that are made of them, so that memory holds a few blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moempi.storage.journal_index import JournalIndex, Journals, TableRows, trace_blocks
from moempi.storage.records import TraceRecord
from moempi.storage.results_columns import create, create_scale
from moempi.storage.results_layout import ABOVE_OFFSETS, TRACES, ranges

SUM_ROWS = 1 << 18
"""Offsets that are summed up at a time."""


def write_above(
    file: Any, journals: Journals, index: JournalIndex, require_success: Callable[[], None]
) -> NDArray[np.int64]:
    """Write /score/above; the number of rows that were found of each request (N,). Raises StorageError."""
    traces, table_rows = index.traces["above"], index.table_rows("above")

    def rows() -> Iterator["_Rows"]:
        for group in traces.groups():
            for records in trace_blocks(journals.trace_at(journal, offset) for journal, offset in group):
                require_success()
                yield _Rows(records, index, table_rows)

    long_name = "row i has values offsets[i] to offsets[i+1] - 1"
    offsets = create(file, ABOVE_OFFSETS, np.int64, ("above_bound",), long_name, fill_value=0)
    found = np.zeros(len(index.entries), np.int64)
    for block in rows():
        np.add.at(found, block.write_counts(offsets), 1)
    create_scale(file, "above_token", _sum_up(offsets))
    columns = {
        name: create(file, column.path, np.dtype(traces.columns[name][0]), column.dims, column.long_name)
        for name, column in TRACES["above"].items()
        if name != "counts"
    }
    for block in rows():
        block.write_values(columns, offsets)
    return found


class _Rows:
    """The rows of records of one attempt that are in the results, in the order of the file."""

    def __init__(self, records: Sequence[TraceRecord], index: JournalIndex, table_rows: TableRows) -> None:
        requests = np.concatenate([record.requests for record in records])
        positions = np.concatenate([record.positions for record in records]).astype(np.int64)
        counts = np.concatenate([record.columns["counts"] for record in records]).astype(np.int64)
        file_rows = (np.cumsum(table_rows.num_rows) - table_rows.num_rows)[requests] + positions
        is_used = (index.entries["since"][requests] == records[0].since) & (positions < table_rows.end[requests])
        order = np.argsort(file_rows, kind="stable")
        order = order[is_used[order]]
        self._requests, self._file_rows, self._counts = requests[order], file_rows[order], counts[order]
        self._firsts = (np.cumsum(counts) - counts)[order]
        self._records = records

    def write_counts(self, offsets: Any) -> NDArray[np.int64]:
        """Write 1 + the number of values of each row behind the place of its offset; the requests of new rows (T,)."""
        is_new = np.zeros(len(self._requests), np.bool_)
        for source, target in ranges(self._file_rows):
            ends = slice(target.start + 1, target.stop + 1)
            is_new[source] = offsets[ends] == 0
            offsets[ends] = 1 + self._counts[source]
        new: NDArray[np.int64] = self._requests[is_new]
        return new

    def write_values(self, columns: dict[str, Any], offsets: Any) -> None:
        """Write the values of the rows whose numbers the offsets have; another record has the values of the others."""
        values = {name: np.concatenate([record.columns[name] for record in self._records]) for name in columns}
        for source, target in ranges(self._file_rows):
            bounds, counts, firsts = offsets[target.start : target.stop + 1], self._counts[source], self._firsts[source]
            for _, rows in ranges(np.flatnonzero(np.diff(bounds) == counts)):
                first, end = bounds[rows.start], bounds[rows.stop]
                of_rows = np.arange(first, end) + np.repeat(firsts[rows] - bounds[rows], counts[rows])
                for name, column in columns.items():
                    column[first:end] = values[name][of_rows]


def _sum_up(offsets: Any) -> int:
    """Replace 1 + lengths, 0 for rows that were not found, by the sums of lengths up to each; the sum of all."""
    total = 0
    for first in range(0, len(offsets), SUM_ROWS):
        sums = total + np.cumsum(np.maximum(offsets[first : first + SUM_ROWS] - 1, 0))
        offsets[first : first + SUM_ROWS] = sums
        total = int(sums[-1])
    return total
