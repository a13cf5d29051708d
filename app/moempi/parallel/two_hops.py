"""Two hops: each row crosses the network once per node, and inside the node goes on to its experts.

A rank's gate on another node is the rank with its own local index there, counted modulo the node's ranks; its gate on
its own node is itself. A row goes to the gate of each node that hosts any of its experts, with the keys and weights
of its choices there; the gate sends it on to the experts, adds up their answers in slot order, and returns one row.
The home adds the nodes' rows in the order of their first slots. `RoutePlan.inside` is the gate's plan for its node.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from moempi.backend.protocol import Array, Backend
from moempi.parallel.exchange import Exchange, Route
from moempi.parallel.placement import Placement
from moempi.parallel.route_plan import RoutePlan
from moempi.parallel.schedule import Point
from moempi.parallel.traffic import Traffic
from moempi.parallel.transports.transfer import Transfer, Transport

IntArray = npt.NDArray[np.integer]
ABSENT = -1


@dataclass(frozen=True)
class Gates:
    """The ways of one rank to every node: `nodes` (R,) are the ranks' nodes, ascending from 0 without gaps."""

    nodes: tuple[int, ...]
    rank: int

    @cached_property
    def members(self) -> tuple[range, ...]:
        """The ranks of each node."""
        bounds = np.searchsorted(self.nodes, range(self.nodes[-1] + 2)).tolist()
        return tuple(range(first, last) for first, last in zip(bounds[:-1], bounds[1:], strict=True))

    @cached_property
    def ranks(self) -> IntArray:
        """The gate on each node (N,), ascending."""
        local = self.rank - self.members[self.nodes[self.rank]].start
        gates = np.array([members[local % len(members)] for members in self.members])
        gates[self.nodes[self.rank]] = self.rank
        return gates

    @property
    def neighbours(self) -> range:
        """The ranks of this rank's node."""
        return self.members[self.nodes[self.rank]]


def numbered(nodes: Sequence[int]) -> tuple[int, ...]:
    """Ascending nodes as numbers from 0 on without gaps."""
    return tuple(np.unique(nodes, return_inverse=True)[1].tolist())


class TwoHops(Exchange):
    """An exchange whose rows cross by `transport`, then travel `inside` the node; its plans are for the first hop."""

    def __init__(
        self,
        comm: MPI.Intracomm,
        placement: Placement,
        backend: Backend,
        *,
        gates: Gates,
        inside: Exchange,
        traffic: Traffic,
        transport: Transport,
        width: int,
        num_layers: int,
    ) -> None:
        super().__init__(
            comm, placement, backend, traffic=traffic, transport=transport, width=width, num_layers=num_layers
        )
        self._gates = gates
        self._inside = inside
        hosts = np.searchsorted(placement.bounds, np.arange(len(placement.keys)), side="right") - 1
        self._node_of_key = np.array(gates.nodes)[hosts]
        self._first_key = int(placement.bounds[gates.neighbours.start])

    def plan(self, route: Route) -> Generator[Point, None, RoutePlan]:
        """See `Exchange.plan`; the choices travel here too, ahead of their rows. Blocks the host for them."""
        keys = self._placement.keys[self._backend.download(route.experts)]
        weights = self._backend.download(route.weights)
        self.load[route.layer] += np.bincount(keys.reshape(-1), minlength=self.load.shape[1])[self._placement.keys]
        where = self._node_of_key[keys]
        tokens, node, places, ones = _pairs(where, len(self._gates.ranks))
        send_counts = np.zeros(self._comm.size, np.int64)
        send_counts[self._gates.ranks] = np.bincount(node, minlength=len(self._gates.ranks))
        recv_counts = np.empty_like(send_counts)
        request = self._comm.Ialltoall(send_counts, recv_counts)
        notice = self._traffic.begin(request, send_counts, recv_counts, waiting="idle")
        yield Point(route.layer, "counts")
        notice.finish()
        here = where[tokens] == node[:, None]
        outgoing = np.stack([np.where(here, keys[tokens], ABSENT), weights[tokens].view(np.int32)], axis=1, dtype=np.int32, casting="same_kind")
        incoming = np.empty((int(recv_counts.sum()), *outgoing.shape[1:]), np.int32)
        notice = self._start_choices(outgoing, send_counts, incoming, recv_counts)
        yield Point(route.layer, "choices")
        notice.finish()
        inside = yield from self._plan_inside(route.layer, incoming[:, 0], incoming[:, 1].view(np.float32))
        return RoutePlan(
            layer=route.layer,
            send_counts=send_counts,
            recv_counts=recv_counts,
            expert_counts=inside.expert_counts,
            source_rows=self._backend.upload(tokens),
            places=self._backend.upload(places),
            weights=self._backend.upload(ones),
            by_expert=None,
            by_source=None,
            inside=inside,
        )
