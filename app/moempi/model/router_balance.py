"""Routing policies: they choose the experts of each row, by the router alone or by the router and the experts' load.

Each lane has its own policy. A balancing policy starts one small all-reduce per step on the lane's communicator.
"""

from collections.abc import Sequence

import numpy as np
from msgspec import structs

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.comm.stage_comm import StageComm
from moempi.comm.transfers import Transfer
from moempi.config.architecture import Router
from moempi.model.capacity import assign_within_quota, quotas


class RoutingPolicy:
    """The model's own routing: the router alone chooses."""

    def begin_step(self, requests: IntArray, positions: IntArray) -> None:
        """Begin a step in which this rank routes these positions (T,) of requests (T,).

        Collective over the stage, may block.
        """

    def choose(
        self, backend: Backend, layer: int, logits: Array, router: Router, correction: Array | None
    ) -> tuple[Array, Array]:
        """Experts (T, K) and weights (T, K) of rows with router logits (T, E)."""
        return backend.choose_experts(logits, router, correction=correction)

    def end_step(self) -> None:
        """End a step, after all of its layers; collective over the stage, may block."""

    def flush(self) -> None:
        """Finish a pending all-reduce, after the last step of a run; collective over the stage, blocks."""


MODEL_ROUTING = RoutingPolicy()


class MoveCounter:
    """The router's own choices on this rank per layer and expert, and the number of choices that a policy moved."""

    def __init__(self, layers: Sequence[int], num_experts: int) -> None:
        self.preferred = {layer: np.zeros(num_experts, np.int64) for layer in layers}
        self.moved = 0

    def count(self, layer: int, preferred: IntArray, chosen: IntArray) -> None:
        """Add the choices (T, K) of one layer: the router's own and the policy's."""
        self.preferred[layer] += np.bincount(preferred.reshape(-1), minlength=len(self.preferred[layer]))
        kept = (chosen[:, :, None] == preferred[:, None, :]).any(axis=2)
        self.moved += int(kept.size - np.count_nonzero(kept))


class ExpertBias:
    """The selection bias `values` (L, E) of the experts of `layers`, which lowers the load of busy experts.

    After each step, the bias of an expert changes by rate * clip((mean - load) / mean, -1, 1), where load is the
    expert's number of choices and mean the mean over the layer's experts; it stays in [-bound, bound]. This is
    auxiliary-loss-free balancing (Wang et al. 2024) with the error instead of its sign. The bias is equal on all ranks
    of a stage, and shared by the lanes of a rank.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, *, rate: float, bound: float) -> None:
        self.layers = tuple(layers)
        self.values = np.zeros((len(layers), num_experts), np.float32)
        self._rate = np.float32(rate)
        self._bound = np.float32(bound)

    def update(self, load: IntArray) -> None:
        """Change the bias by the choices (L, E) of one step, summed over all ranks."""
        mean = load.mean(axis=1, keepdims=True, dtype=np.float32)
        error = np.clip(1 - load.astype(np.float32) / np.maximum(mean, 1e-9), -1, 1) * (mean > 0)
        self.values = np.clip(self.values + self._rate * error, -self._bound, self._bound, dtype=np.float32)


class BiasPolicy(RoutingPolicy):
    """Select by score plus expert bias; the weights are computed from the scores alone."""

    def __init__(self, stage: StageComm, bias: ExpertBias, moves: MoveCounter) -> None:
        self._stage = stage
        self._bias = bias
        self._moves = moves
        self._load = np.zeros(bias.values.shape, np.int64)
        self._load_sum: Transfer[IntArray] | None = None
        self._terms = bias.values

    def begin_step(self, requests: IntArray, positions: IntArray) -> None:
        self.flush()  # the load of the lane's last step
        self._terms = self._bias.values  # other lanes change the bias during this step, on each rank at another time

    def choose(
        self, backend: Backend, layer: int, logits: Array, router: Router, correction: Array | None
    ) -> tuple[Array, Array]:
        """See the base class; blocks the host to download the choices."""
        row = self._bias.layers.index(layer)
        preferred, _ = backend.choose_experts(logits, router, correction=correction)
        chosen, weights = backend.choose_experts(logits, router, correction=correction, selection_bias=self._terms[row])
        on_host = backend.download(chosen)
        self._moves.count(layer, backend.download(preferred), on_host)
        self._load[row] = np.bincount(on_host.reshape(-1), minlength=self._load.shape[1])
        return chosen, weights

    def end_step(self) -> None:
        self._load_sum = self._stage.iallreduce_sum(self._load.reshape(-1).tolist())

    def flush(self) -> None:
        if self._load_sum is not None:
            self._bias.update(self._load_sum.finish().reshape(self._load.shape))
            self._load_sum = None


class CapacityPolicy(RoutingPolicy):
    """Capacity limit: an expert accepts at most ceil(factor * T * K / E) choices of a step, T rows on all ranks.

    The overflow goes to each token's next-best expert.
    """

    def __init__(self, stage: StageComm, moves: MoveCounter, *, factor: float) -> None:
        self._stage = stage
        self._moves = moves
        self._factor = factor
        self._row_sum: Transfer[IntArray] | None = None
        self._rows: IntArray = np.zeros(0, np.int64)

    def begin_step(self, requests: IntArray, positions: IntArray) -> None:
        own = np.zeros(self._stage.size, np.int64)
        own[self._stage.rank] = len(requests)
        self._row_sum = self._stage.iallreduce_sum(own.tolist())

    def choose(
        self, backend: Backend, layer: int, logits: Array, router: Router, correction: Array | None
    ) -> tuple[Array, Array]:
        """See the base class; blocks the host, which assigns the experts."""
        if self._row_sum is not None:
            self._rows, self._row_sum = self._row_sum.finish(), None
        if not len(self._rows):
            raise RuntimeError("a layer is routed before its step began")
        ranked, _ = backend.choose_experts(
            logits, structs.replace(router, top_k=logits.shape[1]), correction=correction
        )
        in_order = backend.download(ranked)
        quota = quotas(
            self._rows,
            self._stage.rank,
            top_k=router.top_k,
            num_experts=in_order.shape[1],
            factor=self._factor,
        )
        chosen = assign_within_quota(in_order, quota, router.top_k)
        self._moves.count(layer, in_order[:, : router.top_k], chosen)
        experts = backend.upload(chosen)
        return experts, backend.weigh_experts(logits, experts, router)
