"""Merge of recorded routing into the results file: one row per computed position of each request.

The next attempt at a job computes an interrupted request again, and its rows replace the rows of the earlier attempt.
Rows are therefore written in the order of the attempts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moempi.storage.journal_index import JournalIndex, Journals
from moempi.storage.records import RoutingRecord
from moempi.storage.results_columns import create, write_offsets
from moempi.storage.results_layout import ROUTING

BLOCK_BYTES = 16 << 20

Rows = dict[str, NDArray[Any]]
"""Columns of /routing by name, all with the same number of rows."""


def write_routing(file: Any, journals: Journals, index: JournalIndex, require_success: Callable[[], None]) -> None:
    """Write /routing from all routing records; memory holds a few blocks of BLOCK_BYTES. Raises StorageError."""
    layers = index.routing.layers
    write_offsets(file, "routing/offsets", index.entries["computed"])
    create(file, "routing/layer", np.int32, ("routed_layer",), "layer of the model")[...] = layers
    columns = {
        name: create(file, f"routing/{name}", column.dtype, column.dims, column.long_name, fill_value=column.fill_value)
        for name, column in ROUTING.items()
    }
    for group in index.routing.groups():
        for records in _blocks(journals.routing_at(journal, offset) for journal, offset in group):
            require_success()
            rows = _sorted_rows(_joined(records), index.entries["computed"])
            _write(columns, rows, [layers.index(layer) for layer in records[0].layers])


def _sorted_rows(rows: Rows, computed: NDArray[np.int64]) -> Rows:
    """Rows sorted by their `file_row`; drops positions beyond the number that the request computed in the end."""
    requests, positions = rows["request"], rows["position"]
    file_rows = (np.cumsum(computed) - computed)[requests] + positions
    order = np.argsort(file_rows)
    order = order[positions[order] < computed[requests[order]]]
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


def _blocks(records: Iterable[RoutingRecord]) -> Iterator[list[RoutingRecord]]:
    """Yield lists of records, each of about BLOCK_BYTES."""
    block: list[RoutingRecord] = []
    num_bytes = 0
    for record in records:
        block.append(record)
        num_bytes += 2 * record.experts.nbytes
        if num_bytes >= BLOCK_BYTES:
            yield block
            block, num_bytes = [], 0
    if block:
        yield block


def _joined(records: list[RoutingRecord]) -> Rows:
    """The concatenated rows of records of the same layers."""
    lengths = [len(record.requests) for record in records]
    num_layers = len(records[0].layers)
    row = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    rank = np.repeat(np.array([record.rank for record in records], np.int32), lengths)
    return {
        "request": np.concatenate([record.requests for record in records]),
        "position": np.concatenate([record.positions for record in records]),
        "step": np.repeat(np.array([record.step for record in records], np.int64), lengths),
        "rank": np.repeat(rank[:, None], num_layers, axis=1),
        "row": np.repeat(row[:, None], num_layers, axis=1),
        "experts": np.concatenate([record.experts for record in records], axis=1).swapaxes(0, 1),
        "weights": np.concatenate([record.weights for record in records], axis=1).swapaxes(0, 1),
    }
