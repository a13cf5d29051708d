"""Two hops: each row crosses the network once per node, and inside the node goes on to its experts.

A rank's gate on another node is the rank with its own local index there, counted modulo the node's ranks; its gate on
its own node is itself. A row goes to the gate of each node that hosts any of its experts, with the keys and weights
of its choices there; the gate sends it on to the experts, adds up their answers in slot order, and returns one row.
The home adds the nodes' rows in the order of their first slots. `RoutePlan.inside` is the gate's plan for its node.
"""

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend
from moempi.comm.exchange import Exchange, Route
from moempi.comm.route_plan import RoutePlan
from moempi.comm.transfers import Transfers
from moempi.comm.transports.base import Transfer, Transport
from moempi.layout.forwarders import ABSENT, Forwarders, NodeTransfers, node_transfers
from moempi.layout.placement import Placement
from moempi.layout.schedule import Point
from moempi.layout.topology import Topology


class TwoHops(Exchange):
    """An exchange whose rows cross by `transport`, then travel `inside` the node; its plans are for the first hop."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        placements: Mapping[int, Placement],
        backend: Backend,
        *,
        topology: Topology,
        inside: Exchange,
        transfers: Transfers,
        transport: Transport,
        width: int,
    ) -> None:
        super().__init__(
            comm,
            placements,
            backend,
            topology=topology,
            transfers=transfers,
            transport=transport,
            width=width,
        )
        self._forwarders = Forwarders(topology.nodes, comm.rank)
        self._inside = inside
        nodes = np.array(topology.nodes)
        self._node_of_physical = {layer: nodes[placement.ranks] for layer, placement in placements.items()}

    def send(self, x: Array, route: Route) -> Generator[Point, None, tuple[RoutePlan, Transfer]]:
        """See `Exchange.send`; the choices travel here too, ahead of their rows. Blocks the host for them."""
        if self.listen is not None:
            self.listen(route)
        keys = self._physical_ids[route.layer][self._backend.download(self._replica_choices(route))]
        weights = self._backend.download(route.weights)
        np.add.at(self.load[route.layer], self.placements[route.layer].experts[keys], 1)
        node_of_key = self._node_of_physical[route.layer]
        crossings = node_transfers(node_of_key[keys], len(self._forwarders.ranks))
        send_counts = np.zeros(self._comm.size, np.int64)
        send_counts[self._forwarders.ranks] = np.bincount(crossings.nodes, minlength=len(self._forwarders.ranks))
        recv_counts = np.empty_like(send_counts)
        request = self._comm.Ialltoall(send_counts, recv_counts)
        notice = self._transfers.track(request, send_counts, recv_counts, waiting="idle")
        yield Point(route.layer, "counts")
        notice.finish()
        outgoing = _choices(crossings, node_of_key, keys, weights)
        notice = self._start_choices(outgoing, send_counts, recv_counts)
        yield Point(route.layer, "choices")
        inside = yield from self._plan_inside(route.layer, notice.finish())
        plan = RoutePlan(
            layer=route.layer,
            send_counts=send_counts,
            recv_counts=recv_counts,
            expert_counts=inside.expert_counts,
            source_rows=self._backend.upload(crossings.tokens),
            output_rows=self._backend.upload(crossings.pairs),
            weights=self._backend.upload(crossings.present),
            by_expert=None,
            by_source=None,
            inside=inside,
        )
        return plan, self.dispatch(x, plan)

    def arrived(self, transfer: Transfer, plan: RoutePlan) -> Generator[Point, None, Array]:
        crossed = yield from super().arrived(transfer, plan)
        inside = self._inside.dispatch(crossed, plan.second)
        yield Point(plan.layer, "dispatch inside")
        return (yield from self._inside.arrived(inside, plan.second))

    def answer(self, rows: Array, plan: RoutePlan) -> Transfer:
        """See `Exchange.answer`: first inside the node."""
        return self._inside.answer(rows, plan.second)

    def combined(self, transfer: Transfer, plan: RoutePlan) -> Generator[Point, None, Array]:
        rows = yield from self._inside.combined(transfer, plan.second)
        homeward = super().answer(rows, plan)
        yield Point(plan.layer, "combine across")
        return (yield from super().combined(homeward, plan))

    def _start_choices(self, outgoing: IntArray, send_counts: IntArray, recv_counts: IntArray) -> Transfer:
        incoming = np.empty((int(recv_counts.sum()), *outgoing.shape[1:]), np.int32)
        numbers = incoming.shape[1] * incoming.shape[2]
        request = self._comm.Ialltoallv(
            [outgoing, send_counts * numbers, MPI.INT32_T], [incoming, recv_counts * numbers, MPI.INT32_T]
        )
        return self._transfers.track(request, outgoing, incoming, waiting="idle")

    def _plan_inside(self, layer: int, choices: IntArray) -> Generator[Point, None, RoutePlan]:
        """The gate's plan for rows whose choices (M, 2, K) have come: keys, ABSENT on another node, and weights."""
        keys, weights = choices[:, 0], choices[:, 1].view(np.float32)
        # The choices of this node first, still in slot order; an absent one repeats the first with no weight.
        slots = np.argsort(keys == ABSENT, axis=1, kind="stable")
        keys, weights = np.take_along_axis(keys, slots, axis=1), np.take_along_axis(weights, slots, axis=1)
        present = keys != ABSENT
        chosen = keys[present] - self.placements[layer].bounds[self._forwarders.node_ranks.start]
        order = np.argsort(chosen, kind="stable")
        places = np.empty(keys.shape, np.int64)
        places[present] = np.argsort(order)
        return self._inside.spread(
            Route(layer, None, self._backend.upload(np.where(present, weights, np.float32(0)))),
            source_rows=self._backend.upload(np.nonzero(present)[0][order]),
            places=self._backend.upload(np.where(present, places, places[:, :1])),
            counts=np.bincount(chosen, minlength=len(self._inside.placements[layer].experts)),
            phase="counts inside",
        )


def _choices(
    pairs: NodeTransfers, node_of_physical: IntArray, physical: IntArray, weights: npt.NDArray[Any]
) -> IntArray:
    """What each crossing row's gate must know (P, 2, K): keys of the choices on its node, and weights, as int32."""
    chosen = physical[pairs.tokens]
    choices = np.empty((len(chosen), 2, physical.shape[1]), np.int32)
    choices[:, 0] = np.where(node_of_physical[chosen] == pairs.nodes[:, None], chosen, ABSENT)
    choices[:, 1] = weights[pairs.tokens].astype(np.float32, copy=False).view(np.int32)
    return choices
