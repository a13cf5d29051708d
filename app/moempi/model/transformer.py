"""The transformer: its forward pass is a generator that yields wherever it waits for rows of other ranks."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from moempi.arrays import IntArray
from moempi.backend.protocol import Attended, Backend, FusedAttention, FusedExperts, FusedLayers
from moempi.backend.values import Array, LayerState, PhysicalIds, Segment
from moempi.comm.addends import Addends, Sums
from moempi.comm.batch import Batch
from moempi.comm.combine import Combine, HomeCombine
from moempi.comm.exchange import Exchange, Route
from moempi.comm.lane_comm import LaneComm
from moempi.comm.transfers import Waits
from moempi.config.architecture import Architecture
from moempi.layout.row_split import RowSplit
from moempi.layout.schedule import TENSOR_PHASES, Point
from moempi.model.attention import Attention
from moempi.model.feed_forward import Dense, MixtureOfExperts
from moempi.model.gated_delta import GatedDelta
from moempi.model.head import LMHead
from moempi.model.kv_cache import KVCache
from moempi.model.latent_attention import LatentAttention
from moempi.model.norm import Norm
from moempi.model.rope import rope_angles
from moempi.model.router_balance import MODEL_ROUTING, RoutingPolicy
from moempi.model.sparse_attention import SparseRows, sparse_rows
from moempi.model.state_space import StateSpaceMixer

GATHER, SCATTER = TENSOR_PHASES
Mixer = Attention | LatentAttention | GatedDelta | StateSpaceMixer
"""The part of a layer in which positions meet."""
WITH_STATE = GatedDelta, StateSpaceMixer
"""The mixers that keep a state per sequence, and no keys and values."""
ATTENTION, FEED_FORWARD = "attention", "feed_forward"

OnHidden = Callable[[int, str, Array], object]
"""Called with a layer, its sublayer ATTENTION or FEED_FORWARD, and the residual stream behind it (T, D).

The next layer may overwrite the rows: verbs that read them are submitted before it returns.
"""


def ignore_hidden(layer: int, sublayer: str, x: Array) -> None:
    """Records nothing."""


class Layer(Struct, frozen=True):
    """One pre-norm block; `index` is its number in the whole model.

    A layer may have an attention alone or a feed-forward alone; then the other and its norm are None.
    `fused_attention` is the attention with both norms as one verb, if the backend has it.
    """

    index: int
    attention_norm: Norm | None
    attention: Mixer | None
    feed_forward_norm: Norm | None
    feed_forward: Dense | MixtureOfExperts | None
    fused_attention: FusedAttention | None = None

    @property
    def fused_parts(self) -> tuple[FusedAttention, FusedExperts] | None:
        """The two parts of a layer that has no others, as verbs."""
        experts = self.feed_forward
        if not isinstance(experts, MixtureOfExperts) or experts.shared is not None:
            return None
        return (self.fused_attention, experts.fused_experts) if self.fused_attention and experts.fused_experts else None

    def attend(
        self,
        backend: Backend,
        x: Array,
        angles: Array,
        cache: Any,
        segments: Sequence[Segment],
        sparse: SparseRows | None,
    ) -> Array:
        """The attention of normalized rows x (T, D), with what the layer keeps of the positions before.

        `sparse` are the rows that attend to chosen positions, if any.
        """
        if isinstance(self.attention, LatentAttention):
            return self.attention(backend, x, angles, cache, segments, sparse)
        if isinstance(self.attention, WITH_STATE):
            return self.attention(backend, x, cache, segments)
        if self.attention is None:
            raise ValueError(f"layer {self.index} has no attention")
        return self.attention(backend, x, angles, cache, segments)

    def attention_verb(self, num_rows: int, *, group_size: int) -> FusedAttention | None:
        """The fused attention; None in a tensor group, and for more rows than it takes."""
        fused = self.fused_attention
        return fused if fused is not None and group_size == 1 and num_rows <= fused.most_rows else None

    def attend_and_pack(
        self,
        backend: Backend,
        x: Array,
        angles: Array,
        cache: Any,
        segments: Sequence[Segment],
        ids: PhysicalIds | None,
    ) -> Attended:
        """The attention of rows x (T, D) of the residual stream, between its two norms; see `protocol.Attend`."""
        rows = self.attend(backend, self.first_norm(backend, x), angles, cache, segments, None)
        total, normalized = add_to_residual(backend, x, rows, self.feed_forward_norm)
        if ids is None or not isinstance(self.feed_forward, MixtureOfExperts):
            return total, normalized, None
        return total, normalized, self.feed_forward.pack(backend, normalized, ids)

    def physical_ids(self, exchange: Exchange, policy: RoutingPolicy) -> PhysicalIds | None:
        """By what the rows are packed behind a fused attention; None where other verbs choose their experts."""
        is_packed = isinstance(self.feed_forward, MixtureOfExperts) and policy is MODEL_ROUTING
        return exchange.physical_ids(self.index) if is_packed else None

    @property
    def can_be_captured(self) -> bool:
        """Whether a step's attention is the same verbs whatever its rows, and has a norm behind it."""
        attention, has_both = self.attention, self.attention_norm is not None and self.feed_forward_norm is not None
        is_sparse = isinstance(attention, LatentAttention) and attention.shape.indexer is not None
        return has_both and isinstance(attention, Attention | LatentAttention) and not is_sparse

    @property
    def first_norm(self) -> Norm:
        """The norm of the residual stream with which the layer begins."""
        norm = self.attention_norm or self.feed_forward_norm
        if norm is None:
            raise ValueError(f"layer {self.index} has neither an attention nor a feed-forward")
        return norm


def with_graphs(layer: Layer, backend: Backend) -> Layer:
    """The layer with its attention captured, if the backend does, and the layer can be."""
    captured = backend.capture_attention(partial(layer.attend_and_pack, backend)) if layer.can_be_captured else None
    return layer if captured is None else replace(layer, fused_attention=captured)


class Transformer(Struct, frozen=True):
    """A rank's share of the model: its part of the layers of its stage, and their cache.

    `architecture` describes the share: its attention has the number of heads of this rank. `embedding` is None except
    on the first stage, `head` except on the last. `states` has a state per slot for each layer that keeps no keys.
    """

    architecture: Architecture
    backend: Backend
    embedding: Array | None
    layers: Sequence[Layer]
    head: LMHead | None
    cache: KVCache
    states: Sequence[LayerState] = ()
    fused_layers: FusedLayers | None = None

    @property
    def layer_caches(self) -> Sequence[Any]:
        """What each layer keeps of the positions before: a Cache, a LayerState, or None without an attention."""
        caches, states = iter(self.cache.layers), iter(self.states)
        return [
            layer.attention and next(states if isinstance(layer.attention, WITH_STATE) else caches)
            for layer in self.layers
        ]

    def embed(self, tokens: IntArray) -> Array:
        """The rows (T, D) of tokens (T,)."""
        return self.backend.embed(tokens, self.embedding)

    def forward(
        self,
        batch: Batch,
        split: RowSplit,
        x: Array,
        comm: LaneComm,
        policy: RoutingPolicy,
        last_combine: Combine,
        *,
        on_hidden: OnHidden = ignore_hidden,
    ) -> Waits[Array]:
        """Compute the layers of the stage for x, this rank's part of the batch's rows; collective over the stage.

        In attention and dense layers, a rank of a tensor group computes all rows with its part of the weights;
        elsewhere it computes its part of the rows. `last_combine` combines the experts' outputs of the stage's last
        layer. Returns this rank's part of the rows after the last layer, or what `last_combine` returns. `on_hidden`
        gets this rank's part of the rows: what a stage begins with is behind the layer before. Yields while it waits
        for rows.
        """
        backend, tensor = self.backend, comm.tensor
        segments, num_rows, rows = self.cache.segments(batch), len(x), None
        angles = rope_angles(backend, self.architecture.attention, batch.positions, batch.row_capacities)
        is_alone = tensor.size == 1 and isinstance(last_combine, HomeCombine) and policy is MODEL_ROUTING
        if self.fused_layers is not None and is_alone and on_hidden is ignore_hidden:
            at_once = self.fused_layers.most_layers(len(x), segments)
            if at_once and all(comm.exchange.keeps_rows(layer.index) for layer in self.layers):
                return (yield from self._compute_fused(x, angles, segments, comm.exchange, at_once=at_once))
        sparse = sparse_rows(backend, self.architecture.attention, segments, batch.row_capacities)
        for layer, cache, following in zip(self.layers, self.layer_caches, [*self.layers[1:], None], strict=True):
            on_hidden(layer.index - 1, FEED_FORWARD, x)
            fused, next_norm = layer.attention_verb(num_rows, group_size=tensor.size), None
            if following is not None and following.attention_verb(num_rows, group_size=tensor.size) is None:
                next_norm = following.first_norm
            packed = None
            if fused is not None:
                ids = layer.physical_ids(comm.exchange, policy)
                x, rows, packed = fused(x, angles, cache, segments, ids)
            elif rows is None:
                rows = layer.first_norm(backend, x)
            if fused is None and layer.attention is not None:
                rows = yield from tensor.all_gather(rows, split, Point(layer.index, GATHER))
                rows = layer.attend(backend, rows, angles, cache, segments, sparse)
                rows = yield from tensor.reduce_scatter(rows, split, Point(layer.index, SCATTER))
                x, rows = add_to_residual(backend, x, rows, layer.feed_forward_norm or next_norm)
            on_hidden(layer.index, ATTENTION, x)
            if isinstance(layer.feed_forward, MixtureOfExperts):
                combine = last_combine if following is None else comm.home_combine
                rms = None if next_norm is None else next_norm.rms
                # The addends have no name here: it would keep x in memory through the next layer.
                x, rows = yield from layer.feed_forward.forward(
                    *(backend, rows, comm.exchange, combine, policy), addends=Addends(None, x, rms), packed=packed
                )
            elif layer.feed_forward is not None:
                rows = yield from tensor.all_gather(rows, split, Point(layer.index, GATHER))
                rows = layer.feed_forward(backend, rows)
                rows = yield from tensor.reduce_scatter(rows, split, Point(layer.index, SCATTER))
                x, rows = add_to_residual(backend, x, rows, next_norm)
        if self.head is not None:
            on_hidden(self.layers[-1].index, FEED_FORWARD, x)
        return x

    def _compute_fused(
        self, x: Array, angles: Array, segments: Sequence[Segment], exchange: Exchange, *, at_once: int
    ) -> Waits[Array]:
        """The rows x (T, D) after all layers, `at_once` of them in a call; all rows stay on this rank."""
        fused, caches = self.fused_layers, self.cache.layers
        if fused is None:
            raise RuntimeError("the layers are not fused")
        for first in range(0, len(self.layers), at_once):
            part = range(first, min(first + at_once, len(self.layers)))
            layers = [self.layers[number].index for number in part]
            loads = [exchange.expert_load[layer] for layer in layers]
            x, *chosen = fused(part, x, angles, caches[part.start : part.stop], segments, loads)
            yield from exchange.pass_over(x, [Route(*route) for route in zip(layers, *chosen, strict=True)])
        return x


def add_to_residual(backend: Backend, x: Array, rows: Array, norm: Norm | None) -> Sums:
    """Add rows to the residual stream x (T, D), and normalize the sum if there is a norm."""
    return Sums(backend.add(x, rows)) if norm is None else Sums(*norm.of_sum(backend, x, rows))
