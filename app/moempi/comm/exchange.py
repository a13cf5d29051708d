"""The exchange of a MoE layer: `dispatch` sends rows to their experts, `combine` adds up the experts' outputs per row.

Each of the two is one transfer, which advances by itself through all its steps, on one hop or two. `dispatch` sends
rows while their numbers are exchanged, so that one latency covers both, except over the collective of `alltoallv`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array, PackedChoices, PhysicalIds
from moempi.comm.addends import NO_ADDENDS, Addends, Sums
from moempi.comm.hop import Hop
from moempi.comm.output_norms import OnNorms, norms_of
from moempi.comm.route_plan import GroupedChoices, RoutePlan, make_plan, rows_by_rank
from moempi.comm.transfers import IDLE, Steps, Transfer, Wait, Waits, downloaded
from moempi.layout.placement import Placement
from moempi.layout.schedule import EXCHANGE_PHASES, Point
from moempi.layout.topology import Topology

DISPATCH, COMBINE = EXCHANGE_PHASES


class Route(NamedTuple):
    """The router's choices for the rows of one layer: experts (T, K) and weights (T, K), both arrays of the backend.

    `packed` are the same choices with the rows packed for this rank's exchange, if they are.
    """

    layer: int
    experts: Array
    weights: Array
    packed: PackedChoices | None = None


OnRoute = Callable[[Route], None]


class Dispatched(NamedTuple):
    """The rows that this rank's experts compute, in expert order, and the plan by which they were sent."""

    rows: Array
    plan: Any


class Exchange(ABC):
    """Moves the rows of one lane between the ranks of a stage.

    `dispatch` and `combine` are collective over them, do not block, and start a transfer each; the generator that they
    return yields once, then returns the transfer's value. `placements` are the placements of each layer's experts on
    the ranks, `topology` is the ranks' topology. `on_route` is called with every route before its experts compute.
    `expert_load` is, for each layer, the number of choices of this rank's rows for each expert (E,); a layer that
    `keeps_rows` may add to it elsewhere.
    """

    def __init__(
        self,
        hop: Hop,
        placements: Mapping[int, Placement],
        topology: Topology,
        *,
        on_route: OnRoute | None = None,
    ) -> None:
        self.placements = placements
        self.expert_load: Mapping[int, IntArray] = {
            layer: np.zeros(placement.num_experts, np.int64) for layer, placement in placements.items()
        }
        self._hop = hop
        self._physical_ids = {
            layer: placement.physical_ids(hop.comm.rank, topology) for layer, placement in placements.items()
        }
        self._on_route = on_route
        self._on_norms: OnNorms | None = None
        in_order = {layer: (tuple(range(placement.num_experts)),) for layer, placement in placements.items()}
        self._alone = {layer for layer, placement in placements.items() if placement.hosted == in_order[layer]}

    def observe_norms(self, on_norms: OnNorms) -> None:
        """Call `on_norms` with the norms of the outputs that are combined on this rank, in each layer."""
        self._on_norms = on_norms

    def dispatch(self, x: Array, route: Route) -> Waits[Dispatched]:
        """Send each row of x (T, D) to the K experts of its route."""
        if self._on_route is not None:
            self._on_route(route)
        transfer = self._hop.transfers.start(self.dispatch_steps(x, route))
        return transfer.received(Point(route.layer, DISPATCH))

    def combine(self, outputs: Array, plan: Any, addends: Addends = NO_ADDENDS) -> Waits[Sums]:
        """Return the experts' outputs, in expert order, to their tokens' ranks; each token's weighted sum (T, D).

        `plan` is the plan of the dispatch. The sums are in slot order; then the addends are added in order. All sums
        are rounded as by `Backend.combine`.
        """
        transfer = self._hop.transfers.start(self.combine_steps(outputs, plan, addends))
        return transfer.received(Point(plan.layer, COMBINE))

    @abstractmethod
    def outputs_buffer(self, plan: Any) -> Array | None:
        """The buffer from which `combine` of this plan, the next call, sends; None if it sends from another memory.

        May block, as `Hop.reserve`.
        """

    def physical_ids(self, layer: int) -> PhysicalIds | None:
        """By what `dispatch` takes choices that are packed before; None if it takes none.

        It takes none for routes that are observed, because packed choices are overwritten in the next layer.
        """
        return None

    def keeps_rows(self, layer: int) -> bool:
        """Whether this rank alone hosts the experts of a layer, in order, and nobody observes their outputs."""
        return layer in self._alone and self._on_norms is None

    def pass_over(self, x: Array, routes: Sequence[Route]) -> Waits[None]:
        """Pass the last point of layers whose rows x (T, D) stay on this rank; their choices are in `expert_load`."""
        if self._on_route is not None:
            for route in routes:
                self._on_route(route)
        num_bytes = routes[0].experts.size * x.shape[1] * self._hop.backend.row_dtype.itemsize
        self._hop.transfers.count_kept(num_bytes, messages=len(EXCHANGE_PHASES) * len(routes))  # there and back
        yield Wait(Point(routes[-1].layer, COMBINE), self._hop.transfers.finished)

    def free(self) -> None:
        """Free communicators and memory of its own, once all transfers are finished; collective, blocks."""
        self._hop.free()

    @abstractmethod
    def dispatch_steps(self, x: Array, route: Route) -> Steps[Dispatched]:
        """The steps of `dispatch`."""

    @abstractmethod
    def combine_steps(self, outputs: Array, plan: Any, addends: Addends = NO_ADDENDS) -> Steps[Sums]:
        """The steps of `combine`."""


class OneHop(Exchange):
    """An exchange that sends a row once for each of its choices, directly to the rank of the expert."""

    def __init__(
        self,
        hop: Hop,
        placements: Mapping[int, Placement],
        topology: Topology,
        *,
        on_route: OnRoute | None = None,
    ) -> None:
        super().__init__(hop, placements, topology, on_route=on_route)
        self._ids: dict[int, PhysicalIds] = {}
        self._num_counts = {layer: _num_counts(placed, hop.comm) for layer, placed in placements.items()}

    def dispatch_steps(self, x: Array, route: Route) -> Steps[Dispatched]:
        """Send rows, while counts are exchanged; receive as soon as the counts of all ranks are received."""
        layer, placement = route.layer, self.placements[route.layer]
        rows, source_rows, output_rows, counts = yield from self._group_steps(x, route)
        (counts,) = yield from downloaded(self._hop.backend, counts)
        counts = counts.astype(np.int64, copy=False)
        send_counts = rows_by_rank(counts, placement.bounds)
        choices = GroupedChoices(counts, send_counts, source_rows, output_rows, route.weights)
        np.add.at(self.expert_load[layer], placement.experts, counts)
        planning = self.plan_from_counts(layer, choices)
        sending = self._hop.send(rows, source_rows, send_counts, written=source_rows is None)
        yield planning
        plan = planning.finish()
        receipt = yield from self._hop.receive_steps(sending, plan.recv_counts)
        return Dispatched(self._hop.unpack(receipt, plan.by_expert), plan)

    def combine_steps(self, outputs: Array, plan: RoutePlan, addends: Addends = NO_ADDENDS) -> Steps[Sums]:
        """Send outputs back to the ranks that dispatched their rows, and add them up there."""
        receipt = yield from self._hop.exchange_steps(outputs, plan.by_source, plan.recv_counts, plan.send_counts)
        on_norms, backend = self._on_norms, self._hop.backend

        def on_outputs(rows: Array, output_rows: Array) -> None:
            if on_norms is not None:
                on_norms(norms_of(backend, rows, output_rows))

        return self._hop.combine(receipt, plan.output_rows, plan.weights, addends, on_outputs=on_outputs)

    def outputs_buffer(self, plan: RoutePlan) -> Array | None:
        """See the base class; rows that return in another order are packed."""
        return self._hop.reserve(sum(plan.recv_counts.tolist())) if plan.by_source is None else None

    def plan_from_counts(self, layer: int, choices: GroupedChoices) -> Transfer[RoutePlan]:
        """Start to exchange counts; the transfer's value is the plan of these choices. Collective, does not block."""
        return self._hop.transfers.start(self._plan_steps(layer, choices), waiting=IDLE)

    def send_steps(self, x: Array, plan: RoutePlan) -> Steps[Array]:
        """Send the rows of x by a plan; the value is the rows that this rank receives, in expert order. Collective."""
        receipt = yield from self._hop.exchange_steps(x, plan.source_rows, plan.send_counts, plan.recv_counts)
        return self._hop.unpack(receipt, plan.by_expert)

    def _group_steps(self, x: Array, route: Route) -> Steps[tuple[Array, Array | None, Array, Array]]:
        """The steps of `Backend.group`; the value is the rows to send, and its results.

        Few rows are packed before the host has their counts, by the verb that computes these: then they are sent as
        they are, and there are no source rows.
        """
        backend, packed, uploaded = self._hop.backend, route.packed, self._uploaded_ids(route.layer)
        if packed is not None:
            return (yield from self._hop.pack_steps(packed.rows)), None, packed.output_rows, packed.counts
        experts = pick_replicas(backend, route.experts, uploaded.period)
        ids, num_ids = uploaded.ids, uploaded.num_ids
        if 0 < experts.size <= backend.most_packed_choices:
            sent = yield from self._hop.reserve_steps(experts.size)
            if sent is not None:
                return sent, None, *backend.group_and_pack(x, experts, ids, sent, num_ids=num_ids)
        return x, *backend.group(experts, ids, num_ids=num_ids)

    def physical_ids(self, layer: int) -> PhysicalIds | None:
        """See the base class."""
        return self._uploaded_ids(layer) if self._on_route is None else None

    def _uploaded_ids(self, layer: int) -> PhysicalIds:
        """The physical ids of a layer, which each step needs; uploaded once, on the lane's own queue."""
        if layer not in self._ids:
            placement, ids = self.placements[layer], self._hop.backend.upload(self._physical_ids[layer])
            self._ids[layer] = PhysicalIds(ids, len(placement.experts), placement.replica_period)
        return self._ids[layer]

    def _plan_steps(self, layer: int, choices: GroupedChoices) -> Steps[RoutePlan]:
        comm = self._hop.comm
        sent, received = self._num_counts[layer]
        if comm.size == 1:
            return make_plan(layer, choices, choices.counts[None])
        counts_here = np.empty((comm.size, received[0]), np.int64)
        yield comm.Ialltoallv([choices.counts, sent, MPI.INT64_T], [counts_here, received, MPI.INT64_T])
        self._hop.transfers.count_rows(sent=int(choices.counts.sum()), received=int(counts_here.sum()))
        return make_plan(layer, choices, counts_here)


def _num_counts(placement: Placement, comm: MPI.Intracomm) -> tuple[Sequence[int], Sequence[int]]:
    """How many counts this rank sends to each rank, one for each expert there, and receives from each."""
    hosted = np.diff(placement.bounds).tolist()
    return hosted, [hosted[comm.rank]] * comm.size


def pick_replicas(backend: Backend, experts: Array, period: int) -> Array:
    """Indices of the choices (T, K) into `Placement.physical_ids`, on the backend."""
    return experts if period == 1 else backend.pick_replicas(experts, period)
