"""What a lane records at the positions that it computes: one record a step and table, in the rank's journal."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Struct

from moempi.arrays import Float32Array, IntArray, narrow, widen
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.comm.batch import NONE, Batch
from moempi.comm.exchange import Route
from moempi.comm.transfers import Transfer
from moempi.config.job import TraceSection
from moempi.config.traces import expert_type, hidden_layers
from moempi.model.norm import Norm
from moempi.model.transformer import FEED_FORWARD, Transformer
from moempi.storage.records import TraceRecord


class TracePlan(Struct, frozen=True):
    """What a rank records: the choices of the routers of the layers `routed`, and the states behind layers `hidden`.

    Choices are `experts` numbers, with `weights` and `home`. The states are recorded as `section` says; of the model's
    last layer they pass through `norm`, if there is one.
    """

    section: TraceSection
    routed: tuple[int, ...] = ()
    experts: type[np.generic] = np.int32
    hidden: tuple[int, ...] = ()
    norm: Norm | None = None
    last_layer: int = -1


def make_trace_plan(section: TraceSection, model: Transformer, layers: range) -> TracePlan | None:
    """What a rank that computes `layers` of a model records; None if the job records nothing."""
    if not section.has_routing and not section.hidden:
        return None
    architecture = model.architecture
    routed = [layer for layer in architecture.moe_layers if layer in layers] if section.has_routing else []
    return TracePlan(
        section,
        tuple(routed),
        np.dtype(expert_type(architecture.experts.num, architecture.experts.router.top_k)).type,
        hidden_layers(section, layers, num_layers=architecture.num_layers),
        model.head.norm if model.head is not None and section.hidden_norm else None,
        architecture.num_layers - 1,
    )


class StepNumbers(Struct, frozen=True):
    """The numbers of a lane's steps: `first`, `first + stride`, ...

    No two lanes share a number, and all are above those of earlier attempts at the job, which ended before step
    `since`.
    """

    since: int
    first: int
    stride: int


class LaneTrace:
    """Collects what the rank `rank` records of one lane's current step.

    The routing of a step is written when the last of its layers is routed, hidden states when it ends: before any
    request of that step can finish, unless its rows are sent on by immediate routing. Norms that return after the step
    are written with its routing, in a later step or by `flush`.
    """

    def __init__(
        self,
        plan: TracePlan,
        write: Callable[[TraceRecord], None],
        backend: Backend,
        *,
        rank: int,
        steps: StepNumbers,
    ) -> None:
        self._plan = plan
        self._write = write
        self._backend = backend
        self._rank = rank
        self._steps = steps
        self._step = steps.first - steps.stride
        self._requests, self._positions, self._kept = np.zeros(0, np.int64), np.zeros(0, np.int32), NONE
        self._in_step = False
        self._routes: list[Route] = []
        self._states: Array | None = None
        self._state_layers: list[int] = []
        self._norms: list[Float32Array] = []
        self._late_norms: Transfer[Float32Array] | None = None
        self._unwritten: deque[tuple[TraceRecord, list[Float32Array], Transfer[Float32Array]]] = deque()

    @property
    def records_hidden(self) -> bool:
        """Whether `add_hidden` has to be called."""
        return bool(self._plan.hidden)

    def begin_step(self, batch: Batch, rows: IntArray, requests: IntArray, positions: IntArray) -> None:
        """Begin a step that computes these rows (T,) of the batch, at `positions` (T,) of `requests` (T,)."""
        while self._unwritten and self._unwritten[0][2].Test():
            self._write_late()
        self._step += self._steps.stride
        self._in_step = True
        self._requests, self._positions = requests.astype(np.int64, copy=False), positions.astype(np.int32)
        if self._plan.hidden:
            self._kept = self._kept_rows(batch, rows)

    def add_route(self, route: Route) -> None:
        """Add the route of one layer of the step; after the last layer, write them. Outside a step do nothing.

        Blocks the host to download the routes of the step; raises StorageError if they cannot be written.
        """
        if not self._in_step or not self._plan.routed:
            return
        self._routes.append(route)
        if route.layer == self._plan.routed[-1] and not self._plan.section.statistics:
            self._write_routing()

    def add_norms(self, norms: Float32Array) -> None:
        """Add the norms (T, K) of one layer's chosen outputs, in order of layers. Outside a step do nothing."""
        if self._in_step:
            self._norms.append(norms)

    def add_late_norms(self, norms: Transfer[Float32Array]) -> None:
        """Add the norms of the step's last layer, which may return after the step."""
        if self._in_step:
            self._late_norms = norms

    def flush(self) -> None:
        """Write the routing of steps whose norms returned later; blocks until they have, on all ranks of the stage."""
        while self._unwritten:
            self._write_late()

    def _write_routing(self) -> None:
        """Write the routes of the step, with the norms of the experts' outputs if they are recorded."""
        columns = self._routing(self._routes)
        norms, late, self._routes, self._norms, self._late_norms = self._norms, self._late_norms, [], [], None
        if late is not None:
            record = self._record("routing", self._plan.routed, columns)
            self._unwritten.append((record, norms, late))
            return
        if norms:
            columns["norms"] = np.stack(norms)
        if len(self._positions):
            self._write(self._record("routing", self._plan.routed, columns))

    def _write_late(self) -> None:
        """Write the first of the records that wait for norms, once these have returned."""
        record, norms, late = self._unwritten.popleft()
        whole = np.stack([*norms, late.finish()])
        if len(record.requests):
            self._write(msgspec.structs.replace(record, columns=record.columns | {"norms": whole}))

    def add_hidden(self, layer: int, sublayer: str, x: Array) -> None:
        """Add the rows x (T, D) behind a layer's `sublayer`, if they are recorded. Does not block the host."""
        plan, backend = self._plan, self._backend
        if not self._in_step or sublayer != plan.section.hidden_sublayer or layer not in plan.hidden:
            return
        first, num_rows = len(self._state_layers) * len(self._kept), len(self._kept)
        if self._states is None:
            self._states = backend.row_buffer(len(plan.hidden) * num_rows, x.shape[1])
        rows: IntArray | None = self._kept
        if plan.norm is not None and layer == plan.last_layer and sublayer == FEED_FORWARD:
            x, rows = plan.norm(backend, backend.take_rows(x, self._kept)), None
        backend.pack(x, rows, self._states[first : first + num_rows])
        self._state_layers.append(layer)

    def end_step(self) -> None:
        """Write the hidden states of the step, and its routing if that has to wait for the experts' outputs.

        Blocks the host to download them; raises StorageError if they cannot be written.
        """
        self._in_step = False
        if self._routes:
            self._write_routing()
        states, self._states = self._states, None
        layers, self._state_layers = tuple(self._state_layers), []
        if states is not None and len(self._kept):
            values = self._stored(self._backend.download(states[: len(layers) * len(self._kept)]))
            values = values.reshape(len(layers), len(self._kept), -1)
            self._write(self._record("hidden", layers, {"values": values}, self._kept))

    def _kept_rows(self, batch: Batch, rows: IntArray) -> IntArray:
        """The rows of this rank whose hidden states are recorded."""
        which = self._plan.section.hidden_positions
        if which == "all":
            return np.arange(len(rows))
        first = np.repeat(np.minimum(batch.prompts, batch.capacities) - 1, batch.lengths)[rows]
        kept = self._positions == first if which == "last" else self._positions >= first
        return np.flatnonzero(kept)

    def _stored(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows as they are recorded; bfloat16 as its bits."""
        if self._plan.section.hidden_dtype == "bfloat16":
            return values if values.dtype == np.uint16 else narrow(values)
        return widen(values) if values.dtype == np.uint16 else values

    def _routing(self, routes: Sequence[Route]) -> dict[str, npt.NDArray[Any]]:
        columns = {"experts": self._joined([route.experts for route in routes], self._plan.experts)}
        if self._plan.section.has_weights:
            columns["weights"] = self._joined([route.weights for route in routes], np.float32)
        return columns

    def _joined(self, layers: Sequence[Array], dtype: type[np.generic]) -> npt.NDArray[Any]:
        """The rows (T, K) of all layers (L, T, K)."""
        joined = np.empty((len(layers), *layers[0].shape), dtype)
        for layer, rows in enumerate(layers):
            joined[layer] = self._backend.download(rows)
        return joined

    def _record(
        self,
        table: Literal["routing", "hidden"],
        layers: tuple[int, ...],
        columns: dict[str, npt.NDArray[Any]],
        rows: IntArray | slice = slice(None),
    ) -> TraceRecord:
        return TraceRecord(
            table=table,
            since=self._steps.since,
            step=self._step,
            rank=self._rank,
            layers=layers,
            requests=self._requests[rows],
            positions=self._positions[rows],
            columns=columns,
            home=table == "routing" and self._plan.section.has_home,
        )
