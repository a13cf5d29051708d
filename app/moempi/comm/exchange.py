"""The exchange of one lane: rows to their experts and back, over a communicator of the lane's own."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from mpi4py import MPI

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend
from moempi.comm.route_plan import RoutePlan, expert_order
from moempi.comm.transfers import Transfers
from moempi.comm.transports.base import Transfer, Transport, start_after_verbs
from moempi.comm.transports.buffers import BufferRing
from moempi.layout.placement import Placement
from moempi.layout.schedule import Point
from moempi.layout.topology import Topology


@dataclass(frozen=True, slots=True)
class Route:
    """The router's choice for the rows of one layer: experts (T, K) and weights (T, K), on the backend's machine."""

    layer: int
    experts: Array
    weights: Array


class Exchange:
    """Moves the rows of one lane among the ranks of `comm`; every method that starts something is collective.

    `placements` say who of them hosts the experts of each layer, `topology` where they stand. `listen`, if set, hears
    of every route that is planned.
    """

    listen: Callable[[Route], None] | None = None

    def __init__(
        self,
        comm: MPI.Intracomm,
        placements: Mapping[int, Placement],
        backend: Backend,
        *,
        topology: Topology,
        transfers: Transfers,
        transport: Transport,
        width: int,
    ) -> None:
        self.placements = placements
        self.load = {layer: np.zeros(placement.num_experts, np.int64) for layer, placement in placements.items()}
        self._physical_ids = {
            layer: placement.physical_ids(comm.rank, topology) for layer, placement in placements.items()
        }
        self._comm = comm
        self._backend = backend
        self._transfers = transfers
        self._transport = transport
        self._incoming = BufferRing(2, partial(backend.comm_buffer, width=width))

    def send(self, x: Array, route: Route) -> Generator[Point, None, tuple[RoutePlan, Transfer]]:
        """Group the choices by destination, tell every rank how many rows to expect, and send each row of x off.

        Rows leave as soon as all ranks have told, even while another lane computes. Yields while counts travel.
        """
        if self.listen is not None:
            self.listen(route)
        placement = self.placements[route.layer]
        rows, places, counts = self._backend.group(self._replica_choices(route), self._physical_ids[route.layer])
        counts = counts[: len(placement.experts)]
        np.add.at(self.load[route.layer], placement.experts, counts)
        sent: list[Transfer] = []
        queue = self._backend.queue

        def send(plan: RoutePlan) -> None:
            current = self._backend.queue
            self._backend.use_queue(queue)
            sent.append(self.dispatch(x, plan))
            self._backend.use_queue(current)

        plan = yield from self.spread(route, source_rows=rows, places=places, counts=counts, phase="counts", then=send)
        return plan, sent[0]

    def spread(
        self,
        route: Route,
        *,
        source_rows: Array,
        places: Array,
        counts: IntArray,
        phase: str,
        then: Callable[[RoutePlan], None] = lambda plan: None,
    ) -> Generator[Point, None, RoutePlan]:
        """The plan of choices that are grouped already: counts[key] of them, from `source_rows`, answered at `places`.

        Of the route only layer and weights count. `then` gets the plan as soon as it is made.
        """
        bounds = self.placements[route.layer].bounds
        sizes = np.diff(bounds)
        counts_here = np.empty((self._comm.size, sizes[self._comm.rank]), np.int64)
        plans: list[RoutePlan] = []

        def conclude() -> None:
            self._transfers.count_mismatch += int(counts.sum() - counts_here.sum())
            by_expert, by_source = expert_order(counts_here)
            before = np.concatenate([[0], np.cumsum(counts)])
            plans.append(
                RoutePlan(
                    layer=route.layer,
                    send_counts=np.diff(before[bounds]),
                    recv_counts=counts_here.sum(axis=1),
                    expert_counts=counts_here.sum(axis=0),
                    source_rows=source_rows,
                    output_rows=places,
                    weights=route.weights,
                    by_expert=by_expert,
                    by_source=by_source,
                )
            )
            then(plans[0])

        request = self._start_counts(counts, sizes, counts_here)
        notice = self._transfers.track(request, counts, counts_here, waiting="idle", then=conclude)
        yield Point(route.layer, phase)
        notice.finish()
        return plans[0]

    def dispatch(self, x: Array, plan: RoutePlan) -> Transfer:
        """Send each row of x to the experts that it chose."""
        return self._send(x, plan.source_rows, plan.send_counts, plan.recv_counts)

    def arrived(self, transfer: Transfer, plan: RoutePlan) -> Generator[Point, None, Array]:
        """Block until dispatched rows are here; the rows in expert order. Yields where they have a second way to go."""
        yield from ()
        landing = transfer.receipt()
        rows, places = landing.rows()
        order = plan.by_expert if places is None else places if plan.by_expert is None else places[plan.by_expert]
        arrived = self._backend.unpack(rows.view(self._backend.row_dtype), order)
        landing.release()
        return arrived

    def answer(self, rows: Array, plan: RoutePlan) -> Transfer:
        """Send the experts' rows, in expert order, back to their homes."""
        return self._send(rows, plan.by_source, plan.recv_counts, plan.send_counts)

    def combined(self, transfer: Transfer, plan: RoutePlan) -> Generator[Point, None, Array]:
        """Block until the answers are here; their weighted sum for each token, in slot order. Yields like `arrived`."""
        yield from ()
        landing = transfer.receipt()
        rows, places = landing.rows()
        order = plan.output_rows if places is None else places[plan.output_rows]
        combined = self._backend.combine(rows.view(self._backend.row_dtype), order, plan.weights)
        landing.release()
        return combined

    def tell(self, owners: IntArray, plan: RoutePlan) -> Transfer:
        """Tell the experts who owns the answer to each row; `finish` gives the owners of arriving rows as they come."""
        outgoing = owners[self._backend.download(plan.source_rows)]
        incoming = np.empty(int(plan.recv_counts.sum()), np.int32)
        request = self._comm.Ialltoallv(
            [outgoing, plan.send_counts, MPI.INT32_T], [incoming, plan.recv_counts, MPI.INT32_T]
        )
        return self._transfers.track(request, outgoing, incoming, waiting="idle")

    @property
    def size(self) -> int:
        """Ranks among which rows travel."""
        return self._comm.size

    @property
    def rank(self) -> int:
        """This rank among them."""
        return self._comm.rank

    def agree(self, amounts: Sequence[int]) -> Transfer:
        """Add up amounts over the ranks; `finish` gives the array of their sums."""
        own, sums = np.array(amounts, np.int64), np.empty(len(amounts), np.int64)
        return self._transfers.track(self._comm.Iallreduce(own, sums), own, sums, waiting="idle")

    def _replica_choices(self, route: Route) -> Array:
        """The choices (T, K) as they stand in the keys of the layer."""
        turns = self.placements[route.layer].replica_period
        return route.experts if turns == 1 else self._backend.pick_replicas(route.experts, turns)

    def _start_counts(self, counts: IntArray, sizes: IntArray, counts_here: IntArray) -> MPI.Request:
        return self._comm.Ialltoallv(
            [counts.astype(np.int64, copy=False), sizes, MPI.INT64_T],
            [counts_here, np.full(self._comm.size, counts_here.shape[1]), MPI.INT64_T],
        )

    def _send(self, rows: Array, index: Array | None, send_counts: IntArray, recv_counts: IntArray) -> Transfer:
        outgoing = self._transport.outgoing(int(send_counts.sum()))
        self._backend.pack(rows, index, outgoing.view(self._backend.row_dtype))
        incoming = self._incoming.take(int(recv_counts.sum()))
        start = partial(self._transport.start, outgoing, send_counts, incoming, recv_counts)
        request = start_after_verbs(self._backend, start)
        return self._transfers.track(request, outgoing, incoming, waiting="exchange")
