"""What a lane records at the positions that it computes: one record a step and table, in the rank's journal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.comm.batch import NONE, Batch
from moempi.comm.exchange import Route
from moempi.config.architecture import Architecture
from moempi.config.job import TraceSection
from moempi.config.traces import expert_type
from moempi.storage.records import TraceRecord


@dataclass(frozen=True, slots=True)
class TracePlan:
    """What a rank records: the choices of the routers of `routed`, as `experts` numbers, with `weights` and `home`."""

    routed: tuple[int, ...] = ()
    experts: type[np.generic] = np.int32
    weights: bool = False
    home: bool = False


def make_trace_plan(section: TraceSection, architecture: Architecture, layers: range) -> TracePlan | None:
    """What a rank that computes `layers` records; None if nothing."""
    if not section.routing:
        return None
    routed = tuple(layer for layer in architecture.moe_layers if layer in layers)
    experts = np.dtype(expert_type(architecture.experts.num, architecture.experts.router.top_k)).type
    return TracePlan(routed, experts, section.has_weights, section.has_home)


class LaneTrace:
    """Collects what is recorded of one lane's current step; the lane takes steps `first_step`, `+ stride`, ...

    No two lanes share a step number, and all are above those of earlier attempts at the job, which ended before step
    `since`. The routing of a step is written when the last of its layers is routed: before any request of that step can
    finish.
    """

    def __init__(
        self,
        plan: TracePlan,
        write: Callable[[TraceRecord], None],
        backend: Backend,
        *,
        rank: int,
        since: int,
        first_step: int,
        stride: int,
    ) -> None:
        self._plan = plan
        self._write = write
        self._backend = backend
        self._rank = rank
        self._since = since
        self._step = first_step - stride
        self._stride = stride
        self._requests = self._positions = NONE
        self._in_step = False
        self._routes: list[Route] = []

    def begin_step(self, batch: Batch, rows: IntArray) -> None:
        """Begin a step that computes these rows (T,) of the batch."""
        self._step += self._stride
        self._in_step = True
        self._requests = np.repeat(batch.requests, batch.lengths)[rows]
        self._positions = batch.positions[rows]

    def add_route(self, route: Route) -> None:
        """Add the route of one layer of the step; after the last layer, write them. Outside a step do nothing.

        Blocks the host to download the routes of the step; raises StorageError if they cannot be written.
        """
        if not self._in_step or not self._plan.routed:
            return
        self._routes.append(route)
        if route.layer == self._plan.routed[-1]:
            self._in_step = False
            routes, self._routes = self._routes, []
            if len(self._positions):
                self._write(self._routing(routes))

    def _routing(self, routes: Sequence[Route]) -> TraceRecord:
        def stacked(arrays: Sequence[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
            return np.stack([self._backend.download(values) for values in arrays]).astype(dtype, copy=False)

        columns = {"experts": stacked([route.experts for route in routes], self._plan.experts)}
        if self._plan.weights:
            columns["weights"] = stacked([route.weights for route in routes], np.float32)
        return TraceRecord(
            table="routing",
            since=self._since,
            step=self._step,
            rank=self._rank,
            layers=self._plan.routed,
            requests=self._requests.astype(np.int64, copy=False),
            positions=self._positions.astype(np.int32),
            columns=columns,
            home=self._plan.home,
        )
