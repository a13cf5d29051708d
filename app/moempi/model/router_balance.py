"""Gating: which experts each row goes to, by the router alone or with an eye on their load.

A lane has a gating of its own. All that it communicates goes once a step through the exchange, beside other rows.
"""

from collections.abc import Sequence

import numpy as np
from msgspec import structs

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend
from moempi.comm.stage_comm import StageComm
from moempi.comm.transfers import Transfer
from moempi.config.architecture import Router
from moempi.model.capacity import assign_within_quota, quotas


class RoutingPolicy:
    """The router alone, as the model was trained."""

    def begin_step(self, num_rows: int) -> None:
        """A step begins in which this rank routes `num_rows` rows; collective, does not block."""

    def choose(
        self, backend: Backend, layer: int, logits: Array, router: Router, correction: Array | None
    ) -> tuple[Array, Array]:
        """Experts (T, K) and weights (T, K) of rows with these router logits (T, E)."""
        return backend.choose_experts(logits, router, correction=correction)

    def end_step(self) -> None:
        """All layers of the step are routed; collective, does not block."""

    def flush(self) -> None:
        """No step follows for now; collective, blocks until what the ranks agree on is agreed."""


MODEL_ROUTING = RoutingPolicy()


class MoveCounter:
    """What balancing did on this rank: choices asked for by the router, per layer and expert, and how many moved."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.preferred = {layer: np.zeros(num_experts, np.int64) for layer in layers}
        self.moved = 0

    def count(self, layer: int, preferred: IntArray, chosen: IntArray) -> None:
        """Enter the choices (T, K) of one layer, as asked for and as made."""
        self.preferred[layer] += np.bincount(preferred.reshape(-1), minlength=len(self.preferred[layer]))
        kept = (chosen[:, :, None] == preferred[:, None, :]).any(axis=2)
        self.moved += int(kept.size - np.count_nonzero(kept))


class ExpertBias:
    """A term for each expert of each layer that moves selection from busy experts to idle ones.

    After each step an expert's term rises by `rate` times how far its load was below the mean, as a share of the mean
    and at most 1, or falls likewise; it stays within `bound` (auxiliary-loss-free balancing, Wang et al. 2024, with the
    error itself for its sign). The same on all ranks of a stage, and shared by a rank's lanes.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, *, rate: float, bound: float) -> None:
        self.layers = tuple(layers)
        self.values = np.zeros((len(layers), num_experts), np.float32)
        self._rate = np.float32(rate)
        self._bound = np.float32(bound)

    def update(self, load: IntArray) -> None:
        """Learn from a step's choices (L, E), those of all ranks."""
        mean = load.mean(axis=1, keepdims=True, dtype=np.float32)
        error = np.clip(1 - load.astype(np.float32) / np.maximum(mean, 1e-9), -1, 1) * (mean > 0)
        self.values = np.clip(self.values + self._rate * error, -self._bound, self._bound, dtype=np.float32)


class BiasPolicy(RoutingPolicy):
    """The router's scores plus `shifts` select; weights stay those of the scores."""

    def __init__(self, stage: StageComm, bias: ExpertBias, moves: MoveCounter) -> None:
        self._stage = stage
        self._bias = bias
        self._moves = moves
        self._load = np.zeros(bias.values.shape, np.int64)
        self._load_sum: Transfer[IntArray] | None = None

    def begin_step(self, num_rows: int) -> None:
        """See `Gating.begin_step`; takes what the ranks agreed on after the lane's last step."""
        self.flush()

    def choose(
        self, backend: Backend, layer: int, logits: Array, router: Router, correction: Array | None
    ) -> tuple[Array, Array]:
        """See `Gating.choose`. Blocks the host to count."""
        row = self._bias.layers.index(layer)
        asked, _ = backend.choose_experts(logits, router, correction=correction)
        chosen, weights = backend.choose_experts(
            logits, router, correction=correction, selection_bias=self._bias.values[row]
        )
        on_host = backend.download(chosen)
        self._moves.count(layer, backend.download(asked), on_host)
        self._load[row] = np.bincount(on_host.reshape(-1), minlength=self._load.shape[1])
        return chosen, weights

    def end_step(self) -> None:
        """See `Gating.end_step`: begins to add up the step's load."""
        self._load_sum = self._stage.iallreduce_sum(self._load.reshape(-1).tolist())

    def flush(self) -> None:
        if self._load_sum is not None:
            self._bias.update(self._load_sum.finish().reshape(self._load.shape))
            self._load_sum = None


class CapacityPolicy(RoutingPolicy):
    """No expert takes more than `factor` times an even share of a step's choices; who is too many goes to the next."""

    def __init__(self, stage: StageComm, moves: MoveCounter, *, factor: float) -> None:
        self._stage = stage
        self._moves = moves
        self._factor = factor
        self._rows: Transfer[IntArray] | None = None

    def begin_step(self, num_rows: int) -> None:
        """See `Gating.begin_step`: begins to tell all ranks how many rows each has."""
        own = np.zeros(self._stage.size, np.int64)
        own[self._stage.rank] = num_rows
        self._rows = self._stage.iallreduce_sum(own.tolist())

    def choose(
        self, backend: Backend, layer: int, logits: Array, router: Router, correction: Array | None
    ) -> tuple[Array, Array]:
        """See `Gating.choose`. Blocks the host, which decides."""
        if self._rows is None:
            raise RuntimeError("rows are routed before their step began")
        ranked, _ = backend.choose_experts(
            logits, structs.replace(router, top_k=logits.shape[1]), correction=correction
        )
        in_order = backend.download(ranked)
        quota = quotas(
            self._rows.finish(),
            self._stage.rank,
            top_k=router.top_k,
            num_experts=in_order.shape[1],
            factor=self._factor,
        )
        chosen = assign_within_quota(in_order, quota, router.top_k)
        self._moves.count(layer, in_order[:, : router.top_k], chosen)
        on_machine = backend.upload(chosen)
        return on_machine, backend.weigh_experts(logits, on_machine, router)
