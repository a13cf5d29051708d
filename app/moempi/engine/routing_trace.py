"""Recorded routing: what the routers of a lane chose, written a record a step into the rank's part."""

from collections.abc import Callable, Sequence

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.comm.batch import NONE, Batch
from moempi.comm.exchange import Route
from moempi.storage.records import RoutingRecord


class RoutingTrace:
    """Holds one step of one lane at most. The lane takes steps `first_step`, `first_step + stride`, and so on.

    Lanes number their steps apart, and above those of earlier attempts at the job, which ended before step `since`.
    A step is written when the last of `layers` is routed: before any answer, and so any finished request, can be.
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
        self._routes: list[Route] = []

    def begin_step(self, batch: Batch, rows: IntArray) -> None:
        """The routes to come are those of these rows of the batch."""
        self._step += self._stride
        self._requests = np.repeat(batch.requests, batch.lengths)[rows]
        self._positions = batch.positions[rows]

    def add_route(self, route: Route) -> None:
        """Take one layer's route; after the last layer, write all. Blocks the host then; raises StorageError."""
        self._routes.append(route)
        if route.layer == self._layers[-1]:
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
