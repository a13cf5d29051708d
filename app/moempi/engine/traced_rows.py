"""Counts of recorded rows, which show at a restart whose rows were lost with a record or with a node."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moempi.storage.records import TraceRecord

AllReduce = Callable[[Any, Callable[..., Any]], Any]


class TracedRows:
    """Recorded rows of each of `num_requests` requests in `tables`, of the latest attempt that has any.

    `since` (N,) int64 is the first step of that attempt, -1 without rows. `num_rows` (tables, N) int64 is their number,
    in tables with layers once for each layer.
    """

    def __init__(self, num_requests: int, tables: Sequence[str]) -> None:
        self.since = np.full(num_requests, -1)
        self.num_rows = np.zeros((len(tables), num_requests), np.int64)
        self._tables = list(tables)

    def add(self, record: TraceRecord) -> None:
        """Count the rows of a record of one of the tables."""
        if record.table not in self._tables:
            return
        self._forget_before(np.unique(record.requests), record.since)
        latest = record.requests[self.since[record.requests] == record.since]
        np.add.at(self.num_rows[self._tables.index(record.table)], latest, max(len(record.layers), 1))

    def reduce(self, allreduce: AllReduce) -> NDArray[np.int64]:
        """The numbers of rows that all ranks counted (tables, N); collective."""
        everything = np.arange(len(self.since))
        self._forget_before(everything, allreduce(self.since, np.maximum))
        num_rows: NDArray[np.int64] = allreduce(self.num_rows, np.add)
        return num_rows

    def _forget_before(self, requests: NDArray[np.int64], since: int | NDArray[np.int64]) -> None:
        """Forget the rows of requests whose latest attempt now is `since`."""
        earlier = requests[self.since[requests] < since]
        self.num_rows[:, earlier] = 0
        self.since[requests] = np.maximum(self.since[requests], since)
