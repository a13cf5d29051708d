"""Two hops: each row is sent across the network once per node, and inside the node to its experts.

A rank's forwarder on another node is the rank with the same local index, modulo the node's ranks; on its own node it is
the rank itself. A row is sent to the forwarder of each node that hosts any of its experts, with the physical experts
and weights of its choices on that node. The forwarder sends the row to the experts, adds up their outputs in slot
order, and returns one row. The home rank adds the nodes' rows in the order of their first slots.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from moempi.arrays import Float32Array, IntArray
from moempi.backend.values import Array
from moempi.comm.addends import NO_ADDENDS, Addends, Sums
from moempi.comm.exchange import Dispatched, Exchange, OneHop, OnRoute, Route, pick_replicas
from moempi.comm.hop import Hop
from moempi.comm.output_norms import OnNorms
from moempi.comm.route_plan import GroupedChoices, RoutePlan, TwoHopPlan, rows_by_rank
from moempi.comm.transfers import IDLE, Steps, Transfer, complete, downloaded
from moempi.comm.transports.base import Transport
from moempi.layout.forwarders import ABSENT, Forwarders, NodeTransfers, node_transfers
from moempi.layout.placement import Placement
from moempi.layout.topology import Topology


class TwoHops(Exchange):
    """An exchange of two hops, `across` the nodes of a stage and `inside` a node.

    `choices` sends the choice messages, CHOICE_BYTES for each of a row's choices, between the ranks of `across`.
    """

    def __init__(
        self,
        across: Hop,
        choices: Transport,
        inside: OneHop,
        placements: Mapping[int, Placement],
        topology: Topology,
        *,
        on_route: OnRoute | None = None,
    ) -> None:
        super().__init__(across, placements, topology, on_route=on_route)
        self._choices = choices
        self._inside = inside
        self._of_forwarder: list[Float32Array] = []
        self._forwarders = Forwarders(topology.nodes, across.comm.rank)
        nodes = np.array(topology.nodes)
        self._node_of_physical = {layer: nodes[placement.ranks] for layer, placement in placements.items()}

    def free(self) -> None:
        """Free the transports of both hops."""
        super().free()
        self._choices.free()
        self._inside.free()

    def dispatch_steps(self, x: Array, route: Route) -> Steps[Dispatched]:
        """Send rows and choices across, while counts are exchanged; plan inside the node while rows travel."""
        layer, backend, placement = route.layer, self._hop.backend, self.placements[route.layer]
        replicas = pick_replicas(backend, route.experts, placement.replica_period)
        chosen, weights = yield from downloaded(backend, replicas, route.weights)
        physical = self._physical_ids[layer][chosen]
        np.add.at(self.expert_load[layer], placement.experts[physical], 1)
        pairs = node_transfers(self._node_of_physical[layer][physical], len(self._forwarders.ranks))
        send_counts = self._send_counts(pairs)
        counts = self._start_counts(send_counts)
        sending = self._hop.send(x, backend.upload(pairs.tokens), send_counts)
        self._send_choices(_choice_messages(pairs, self._node_of_physical[layer], physical, weights), send_counts)
        yield counts
        recv_counts = counts.finish()
        receiving = self._hop.transfers.start(self._hop.receive_steps(sending, recv_counts))
        choices = self._receive_choices(recv_counts, physical.shape[1])
        yield choices
        received = choices.finish()
        planning = self._plan_inside(layer, received)
        yield planning
        plan = TwoHopPlan(
            layer=layer,
            send_counts=send_counts,
            recv_counts=recv_counts,
            output_rows=backend.upload(pairs.pairs),
            present=backend.upload(pairs.present),
            inside=planning.finish(),
            tokens=pairs.tokens,
            chosen=received[:, 0] != ABSENT,
        )
        yield receiving
        rows = self._hop.unpack(receiving.finish(), None)
        return Dispatched((yield from self._inside.send_steps(rows, plan.inside)), plan)

    def combine_steps(self, outputs: Array, plan: TwoHopPlan, addends: Addends = NO_ADDENDS) -> Steps[Sums]:
        """Combine inside the node, then across the nodes."""
        rows, _ = yield from self._inside.combine_steps(outputs, plan.inside)
        if self._on_norms is not None:
            self._on_norms((yield from self._norm_steps(plan, len(plan.output_rows))))
        receipt = yield from self._hop.exchange_steps(rows, None, plan.recv_counts, plan.send_counts)
        return self._hop.combine(receipt, plan.output_rows, plan.present, addends)

    def outputs_buffer(self, plan: TwoHopPlan) -> Array | None:
        """See the base class."""
        return self._inside.outputs_buffer(plan.inside)

    def observe_norms(self, on_norms: OnNorms) -> None:
        """See the base class; a forwarder has the norms of its node's experts, and sends them to the home ranks."""
        super().observe_norms(on_norms)
        self._inside.observe_norms(self._of_forwarder.append)

    def _norm_steps(self, plan: TwoHopPlan, num_tokens: int) -> Steps[Float32Array]:
        """Send this forwarder's norms to the home ranks; the value is the norms of this rank's tokens (T, K)."""
        in_slots, (of_forwarder,) = np.zeros(plan.chosen.shape, np.float32), self._of_forwarder
        self._of_forwarder.clear()
        num_chosen = plan.chosen.sum(axis=1, keepdims=True)
        in_slots[plan.chosen] = of_forwarder[np.arange(plan.chosen.shape[1]) < num_chosen]
        top_k = plan.chosen.shape[1]
        incoming = np.empty((int(plan.send_counts.sum()), top_k), np.float32)
        yield self._hop.comm.Ialltoallv(
            [in_slots, plan.recv_counts * top_k, MPI.FLOAT], [incoming, plan.send_counts * top_k, MPI.FLOAT]
        )
        norms = np.zeros((num_tokens, top_k), np.float32)
        np.add.at(norms, plan.tokens, incoming)  # of each choice one node has the norm, the others 0
        return norms

    def _send_counts(self, pairs: NodeTransfers) -> IntArray:
        """The rows to each rank (R,)."""
        forwarders = self._forwarders.ranks
        counts = np.zeros(self._hop.comm.size, np.int64)
        counts[forwarders] = np.bincount(pairs.nodes, minlength=len(forwarders))
        return counts

    def _start_counts(self, send_counts: IntArray) -> Transfer[IntArray]:
        """Start to exchange counts; the value is the rows from each rank (R,). Collective."""
        recv_counts = np.empty_like(send_counts)
        request = self._hop.comm.Ialltoall(send_counts, recv_counts)
        return self._hop.transfers.start(complete(request, recv_counts, send_counts), waiting=IDLE)

    def _send_choices(self, messages: IntArray, counts: IntArray) -> None:
        """Send choice messages (M, 2, K), ordered by rank; collective, does not block."""
        outgoing = self._choices.outgoing(len(messages))
        outgoing.view(np.int32).reshape(messages.shape)[:] = messages
        self._choices.send(outgoing, counts)

    def _receive_choices(self, counts: IntArray, top_k: int) -> Transfer[IntArray]:
        """Start to receive choice messages; the value is these (M, 2, K). Collective."""
        incoming = self._choices.incoming(int(counts.sum()))
        messages = incoming.view(np.int32).reshape(len(incoming), 2, top_k)
        return self._hop.transfers.start(complete(self._choices.receive(incoming, counts), messages), waiting=IDLE)

    def _plan_inside(self, layer: int, messages: IntArray) -> Transfer[RoutePlan]:
        """Start to plan the second hop of the rows with these choice messages (M, 2, K). Collective."""
        physical, weights = messages[:, 0], messages[:, 1].view(np.float32)
        # The choices on this node first, in slot order. An absent choice repeats the first one, with weight 0.
        slots = np.argsort(physical == ABSENT, axis=1, kind="stable")
        physical, weights = np.take_along_axis(physical, slots, axis=1), np.take_along_axis(weights, slots, axis=1)
        present = physical != ABSENT
        local_physical = physical[present] - self.placements[layer].bounds[self._forwarders.node_ranks.start]
        order = np.argsort(local_physical, kind="stable")
        output_rows = np.empty(physical.shape, np.int64)
        output_rows[present] = np.argsort(order)
        upload = self._hop.backend.upload
        placement = self._inside.placements[layer]
        counts = np.bincount(local_physical, minlength=len(placement.experts))
        grouped = GroupedChoices(
            counts=counts,
            send_counts=rows_by_rank(counts, placement.bounds),
            source_rows=upload(np.nonzero(present)[0][order]),
            output_rows=upload(np.where(present, output_rows, output_rows[:, :1])),
            weights=upload(np.where(present, weights, np.float32(0))),
        )
        return self._inside.plan_from_counts(layer, grouped)


def _choice_messages(
    pairs: NodeTransfers, node_of_physical: IntArray, physical: IntArray, weights: npt.NDArray[Any]
) -> IntArray:
    """The choices of each row for its forwarder (P, 2, K), as int32.

    These are the physical experts, ABSENT if on another node, and the bits of the float32 weights.
    """
    chosen = physical[pairs.tokens]
    messages = np.empty((len(chosen), 2, physical.shape[1]), np.int32)
    messages[:, 0] = np.where(node_of_physical[chosen] == pairs.nodes[:, None], chosen, ABSENT)
    messages[:, 1] = weights[pairs.tokens].astype(np.float32, copy=False).view(np.int32)
    return messages
