"""The two kinds of feed-forward: dense, and a Mixture of Experts whose experts are on many ranks."""

from collections.abc import Sequence

from msgspec import Struct

from moempi.backend.protocol import Backend, FusedExperts
from moempi.backend.values import Array, Expert, ExpertsBlock, PackedChoices, PhysicalIds
from moempi.comm.addends import NO_ADDENDS, Addends, Sums
from moempi.comm.combine import Combine, HomeCombine
from moempi.comm.exchange import Exchange, Route, pick_replicas
from moempi.comm.transfers import Waits
from moempi.config.architecture import Router
from moempi.model.router_balance import MODEL_ROUTING, RoutingPolicy


class Dense(Struct, frozen=True):
    """One network for every row."""

    mlp: Expert

    def __call__(self, backend: Backend, x: Array) -> Array:
        """Map rows x (T, D) to (T, D); with a part of the hidden width, to an addend of the result."""
        hidden = backend.linear(x, self.mlp.gate_up)
        hidden = backend.swiglu(hidden) if self.mlp.gated else backend.squared_relu(hidden)
        return backend.linear(hidden, self.mlp.down)


class LatentMaps(Struct, frozen=True):
    """The matrices that map a row to the width of its experts (D to L), and the weighted sum of their outputs back."""

    down: Array
    up: Array

    def expand(self, backend: Backend, sums: Array, addends: Addends) -> Array:
        """Map the sums (T, L) to (T, D), and add the addends, rounded as `Backend.combine` does."""
        total = backend.linear(sums, self.up)
        for rows in addends.in_order():
            total = backend.add(rows, total)
        return total


class MixtureOfExperts(Struct, frozen=True):
    """A router (D to E), the experts that this rank hosts, and the shared expert that computes every row.

    The output of the shared expert is scaled by the sigmoid of `shared_gate` (D to 1), if the model has one. With
    `latent` maps, the rank that holds a token computes both, so that rows of L numbers are exchanged. `fused_experts`
    is the layer without exchange and shared expert as one verb, if the backend has it.
    """

    layer: int
    rule: Router
    router: Array
    experts: Sequence[Expert]
    router_bias: Array | None = None
    router_correction: Array | None = None
    shared: Dense | None = None
    shared_gate: Array | None = None
    latent: LatentMaps | None = None
    fused_experts: FusedExperts | None = None

    def block(self) -> ExpertsBlock | None:
        """The layer on a rank that hosts all its experts in order; None if it has parts that a block has not."""
        if self.latent is not None:
            return None
        return ExpertsBlock(self.router, self.router_bias, self.rule, self.router_correction, self.experts)

    def forward(
        self,
        backend: Backend,
        x: Array,
        exchange: Exchange,
        combine: Combine,
        policy: RoutingPolicy = MODEL_ROUTING,
        *,
        addends: Addends = NO_ADDENDS,
        packed: PackedChoices | None = None,
    ) -> Waits[Sums]:
        """Dispatch rows x (T, D) to their K experts, compute the experts, and combine the outputs.

        `combine` adds the shared expert's output and the addends, and decides where the sums go; its rows on this rank
        (T, D) are returned. `packed` are the choices of `pack`, if they were computed before. Collective over the ranks
        of the stage. Yields while rows are on the network.
        """
        fused, is_alone = self.fused_experts, isinstance(combine, HomeCombine) and exchange.keeps_rows(self.layer)
        if fused is not None and len(x) <= fused.most_rows and is_alone and policy is MODEL_ROUTING:
            addends = Addends(self._shared(backend, x), addends.residual)
            sums, *chosen = fused(x, addends.in_order(), exchange.expert_load[self.layer])
            yield from exchange.pass_over(x, [Route(self.layer, *chosen)])
            return Sums(sums)
        if packed is None:
            dispatch = exchange.dispatch(self._routed(backend, x), self._route(backend, x, policy))
        else:
            dispatch = exchange.dispatch(x, Route(self.layer, packed.experts, packed.weights, packed))
        addends = addends._replace(shared=self._shared(backend, x))
        rows, plan = yield from dispatch
        sent = addends if self.latent is None else NO_ADDENDS
        buffer = combine.begin(plan, sent)
        outputs = backend.expert_mlp(rows, self.experts, plan.expert_counts, out=buffer)
        sums = yield from combine.finish(outputs, plan, sent)
        return sums if self.latent is None else Sums(self.latent.expand(backend, sums.rows, addends))

    def pack(self, backend: Backend, x: Array, ids: PhysicalIds) -> PackedChoices | None:
        """Choose experts for rows x (T, D), and pack the rows as `dispatch` does; None if they are too many."""
        num_choices = len(x) * self.rule.top_k
        if not 0 < num_choices <= backend.most_packed_choices:
            return None
        _, experts, weights, _ = self._route(backend, x, MODEL_ROUTING)
        routed, chosen = self._routed(backend, x), pick_replicas(backend, experts, ids.period)
        rows = backend.row_buffer(num_choices, routed.shape[1])
        sorted_choices = backend.group_and_pack(routed, chosen, ids.ids, rows, num_ids=ids.num_ids)
        return PackedChoices(experts, weights, rows, *sorted_choices)

    def _routed(self, backend: Backend, x: Array) -> Array:
        """The rows that are sent to experts."""
        return x if self.latent is None else backend.linear(x, self.latent.down)

    def _route(self, backend: Backend, x: Array, policy: RoutingPolicy) -> Route:
        logits = backend.logits(x, self.router, self.router_bias)
        chosen, weights = policy.choose(backend, self.layer, logits, self.rule, self.router_correction)
        return Route(self.layer, chosen, weights)

    def _shared(self, backend: Backend, x: Array) -> Array | None:
        if self.shared is None:
            return None
        rows = self.shared(backend, x)
        return rows if self.shared_gate is None else backend.scale_by_sigmoid(rows, backend.linear(x, self.shared_gate))
