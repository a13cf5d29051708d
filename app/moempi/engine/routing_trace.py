"""Recorded routing: the experts and weights that the routers chose, one record a step in the rank's journal."""

from collections.abc import Callable, Sequence

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.comm.batch import NONE, Batch
from moempi.comm.exchange import Route
from moempi.storage.records import RoutingRecord


class RoutingTrace:
    """Collects the routes of one lane's current step; the lane takes steps `first_step`, `first_step + stride`, ...

    No two lanes share a step number, and all are above those of earlier attempts at the job, which ended before step
    `since`. A step is written when the last of `layers` is routed: before any request of that step can finish.
    """

    def __init__(
        self,
        write: Callable[[RoutingRecord], None],
        backend: Backend,
        *,
        layers: Sequence[int],
        rank: int,
        since: int,
        first_step: int,
        stride: int,
    ) -> None:
        self._write = write
        self._backend = backend
        self._layers = tuple(layers)
        self._rank = rank
        self._since = since
        self._step = first_step - stride
        self._stride = stride
        self._requests = self._positions = NONE
        self._in_step = False
        self._routes: list[Route] = []

    def begin_step(self, batch: Batch, rows: IntArray) -> None:
        """Begin a step that routes these rows (T,) of the batch."""
        self._step += self._stride
        self._in_step = True
        self._requests = np.repeat(batch.requests, batch.lengths)[rows]
        self._positions = batch.positions[rows]

    def add_route(self, route: Route) -> None:
        """Add the route of one layer of the step; after the last layer, write the step. Outside a step do nothing.

        Blocks the host to download the routes of the step; raises StorageError if it cannot be written.
        """
        if not self._in_step:
            return
        self._routes.append(route)
        if route.layer == self._layers[-1]:
            self._in_step = False
            routes, self._routes = self._routes, []
            if len(self._positions):
                self._write(self._record(routes))

    def _record(self, routes: Sequence[Route]) -> RoutingRecord:
        return RoutingRecord(
            since=self._since,
            step=self._step,
            rank=self._rank,
            layers=self._layers,
            requests=self._requests.astype(np.int64, copy=False),
            positions=self._positions.astype(np.int32),
            experts=np.stack([self._backend.download(route.experts) for route in routes], dtype=np.int32),
            weights=np.stack([self._backend.download(route.weights) for route in routes], dtype=np.float32),
        )
