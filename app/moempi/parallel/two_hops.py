"""Two hops: each row crosses the network once per node, and inside the node goes on to its experts.

A rank's gate on another node is the rank with its own local index there, counted modulo the node's ranks; its gate on
its own node is itself. A row goes to the gate of each node that hosts any of its experts, with the keys and weights
of its choices there; the gate sends it on to the experts, adds up their answers in slot order, and returns one row.
The home adds the nodes' rows in the order of their first slots. `RoutePlan.inside` is the gate's plan for its node.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

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
        return tuple(range(first, last) for first, last in pairwise(bounds))

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
        if self.listen is not None:
            self.listen(route)
        keys = self._placement.keys[self._backend.download(route.experts)]
        weights = self._backend.download(route.weights)
        self.load[route.layer] += np.bincount(keys.reshape(-1), minlength=self.load.shape[1])[self._placement.keys]
        crossings = cross(self._node_of_key[keys], len(self._gates.ranks))
        send_counts = np.zeros(self._comm.size, np.int64)
        send_counts[self._gates.ranks] = np.bincount(crossings.nodes, minlength=len(self._gates.ranks))
        recv_counts = np.empty_like(send_counts)
        request = self._comm.Ialltoall(send_counts, recv_counts)
        notice = self._traffic.begin(request, send_counts, recv_counts, waiting="idle")
        yield Point(route.layer, "counts")
        notice.finish()
        outgoing = _choices(crossings, self._node_of_key, keys, weights)
        notice = self._start_choices(outgoing, send_counts, recv_counts)
        yield Point(route.layer, "choices")
        inside = yield from self._plan_inside(route.layer, notice.finish())
        return RoutePlan(
            layer=route.layer,
            send_counts=send_counts,
            recv_counts=recv_counts,
            expert_counts=inside.expert_counts,
            source_rows=self._backend.upload(crossings.tokens),
            places=self._backend.upload(crossings.places),
            weights=self._backend.upload(crossings.present),
            by_expert=None,
            by_source=None,
            inside=inside,
        )

    def arrived(self, transfer: Transfer, plan: RoutePlan) -> Generator[Point, None, Array]:
        """See `Exchange.arrived`."""
        crossed = yield from super().arrived(transfer, plan)
        inside = self._inside.dispatch(crossed, plan.second)
        yield Point(plan.layer, "dispatch inside")
        return (yield from self._inside.arrived(inside, plan.second))

    def answer(self, rows: Array, plan: RoutePlan) -> Transfer:
        """See `Exchange.answer`: first inside the node."""
        return self._inside.answer(rows, plan.second)

    def combined(self, transfer: Transfer, plan: RoutePlan) -> Generator[Point, None, Array]:
        """See `Exchange.combined`."""
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
        return self._traffic.begin(request, outgoing, incoming, waiting="idle")

    def _plan_inside(self, layer: int, choices: IntArray) -> Generator[Point, None, RoutePlan]:
        """The gate's plan for rows whose choices (M, 2, K) have come: keys, ABSENT on another node, and weights."""
        keys, weights = choices[:, 0], choices[:, 1].view(np.float32)
        # The choices of this node first, still in slot order; an absent one repeats the first with no weight.
        slots = np.argsort(keys == ABSENT, axis=1, kind="stable")
        keys, weights = np.take_along_axis(keys, slots, axis=1), np.take_along_axis(weights, slots, axis=1)
        present = keys != ABSENT
        chosen = keys[present] - self._first_key
        order = np.argsort(chosen, kind="stable")
        places = np.empty(keys.shape, np.int64)
        places[present] = np.argsort(order)
        return self._inside.spread(
            Route(layer, None, self._backend.upload(np.where(present, weights, np.float32(0)))),
            source_rows=self._backend.upload(np.nonzero(present)[0][order]),
            places=self._backend.upload(np.where(present, places, places[:, :1])),
            counts=np.bincount(chosen, minlength=self._inside.num_experts),
            phase="counts inside",
        )


@dataclass(frozen=True, slots=True)
class Crossings:
    """The (token, node) pairs of one plan, ordered by node: `tokens` (P,) and `nodes` (P,).

    `places` (T, N) are each token's pairs in the order of their first slots; where a token has fewer than N, the first
    is repeated with 0 in `present` (T, N), which has 1 elsewhere.
    """

    tokens: IntArray
    nodes: IntArray
    places: IntArray
    present: npt.NDArray[np.float32]


def cross(where: IntArray, num_nodes: int) -> Crossings:
    """The crossings of tokens whose choices are on the nodes `where` (T, K)."""
    first_slots = np.full((len(where), num_nodes), where.shape[1])
    for slot in reversed(range(where.shape[1])):
        first_slots[np.arange(len(where)), where[:, slot]] = slot
    nodes, tokens = np.nonzero((first_slots < where.shape[1]).T)
    pairs = np.full(first_slots.shape, ABSENT)
    pairs[tokens, nodes] = np.arange(len(tokens))
    places = np.take_along_axis(pairs, np.argsort(first_slots, axis=1, kind="stable"), axis=1)
    present = places != ABSENT
    return Crossings(tokens, nodes, np.where(present, places, places[:, :1]), present.astype(np.float32))


def _choices(crossings: Crossings, node_of_key: IntArray, keys: IntArray, weights: npt.NDArray[Any]) -> IntArray:
    """What each crossing row's gate must know (P, 2, K): keys of the choices on its node, and weights, as int32."""
    chosen = keys[crossings.tokens]
    choices = np.empty((len(chosen), 2, keys.shape[1]), np.int32)
    choices[:, 0] = np.where(node_of_key[chosen] == crossings.nodes[:, None], chosen, ABSENT)
    choices[:, 1] = weights[crossings.tokens].astype(np.float32, copy=False).view(np.int32)
    return choices
