"""The two kinds of feed-forward: dense, and a Mixture of Experts whose experts live on many ranks."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from moempi.backend.protocol import Array, Backend, Expert
from moempi.comm.exchange import Exchange, Route
from moempi.comm.immediate import ImmediateCombine
from moempi.config.architecture import Router
from moempi.layout.schedule import Point
from moempi.model.router_balance import MODEL_ROUTING, RoutingPolicy


@dataclass(frozen=True, slots=True)
class Dense:
    """One SwiGLU network for every row."""

    mlp: Expert

    def __call__(self, backend: Backend, x: Array) -> Array:
        """Map rows (T, D) to (T, D); a part of the hidden size gives a partial result."""
        return backend.linear(backend.swiglu(backend.linear(x, self.mlp.gate_up)), self.mlp.down)


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """A router (D to E), the experts that this rank hosts, and the network that every row passes beside them.

    `shared_gate` (D to 1), if there is one, decides how much of the shared network's result counts.
    """

    layer: int
    rule: Router
    router: Array
    experts: Sequence[Expert]
    router_bias: Array | None = None
    router_correction: Array | None = None
    shared: Dense | None = None
    shared_gate: Array | None = None

    def forward(
        self, backend: Backend, x: Array, exchange: Exchange, policy: RoutingPolicy = MODEL_ROUTING
    ) -> Generator[Point, None, Array]:
        """X (T, D) -> (T, D): every row to its K experts and back. Yields while rows are on the network."""
        plan, outward = yield from exchange.send(x, self._route(backend, x, policy))
        shared = self._shared(backend, x)
        yield Point(self.layer, "dispatch")
        rows = yield from exchange.arrived(outward, plan)
        rows = backend.expert_mlp(rows, self.experts, plan.expert_counts)
        homeward = exchange.answer(rows, plan)
        yield Point(self.layer, "combine")
        combined = yield from exchange.combined(homeward, plan)
        return combined if shared is None else backend.add(combined, shared)

    def forward_immediate(
        self,
        backend: Backend,
        x: Array,
        residual: Array,
        exchange: Exchange,
        combine: ImmediateCombine,
        policy: RoutingPolicy = MODEL_ROUTING,
    ) -> Generator[Point, None, None]:
        """The same for a stage's last layer whose answers, added to `residual`, are wanted by the next stage alone."""
        plan, outward = yield from exchange.send(x, self._route(backend, x, policy))
        owners = exchange.tell(combine.owners, plan)
        combine.send_residual(plan, residual, self._shared(backend, x))
        yield Point(self.layer, "dispatch")
        rows = yield from exchange.arrived(outward, plan)
        rows = backend.expert_mlp(rows, self.experts, plan.expert_counts)
        combine.send_outputs(rows, plan, owners.finish())

    def _route(self, backend: Backend, x: Array, policy: RoutingPolicy) -> Route:
        logits = backend.router_logits(x, self.router, self.rule, bias=self.router_bias)
        chosen, weights = policy.choose(backend, self.layer, logits, self.rule, self.router_correction)
        return Route(self.layer, chosen, weights)

    def _shared(self, backend: Backend, x: Array) -> Array | None:
        if self.shared is None:
            return None
        rows = self.shared(backend, x)
        return rows if self.shared_gate is None else backend.scale_by_sigmoid(rows, backend.linear(x, self.shared_gate))
