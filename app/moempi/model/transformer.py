"""The transformer: the forward pass reads as a straight line, and yields wherever rows are on the network."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from moempi.backend.protocol import Array, Backend
from moempi.config.architecture import Architecture
from moempi.model.attention import Attention
from moempi.model.batch import Batch
from moempi.model.feed_forward import Dense, MixtureOfExperts
from moempi.model.kv_cache import KVCache
from moempi.parallel.exchange import Exchange
from moempi.parallel.schedule import Point


@dataclass(frozen=True, slots=True)
class Layer:
    """One pre-norm block."""

    attention_norm: Array
    attention: Attention
    feed_forward_norm: Array
    feed_forward: Dense | MixtureOfExperts


@dataclass(frozen=True, slots=True)
class Transformer:
    """A model as one rank holds it: all of the dense weights, the rank's share of the experts, and its cache."""

    architecture: Architecture
    backend: Backend
    embedding: Array
    layers: Sequence[Layer]
    norm: Array
    head: Array
    cache: KVCache

    def forward(self, batch: Batch, exchange: Exchange) -> Generator[Point, None, Array]:
        """The rows of the batch whose logits are wanted, ready for `logits` (N, D). Collective over the lane."""
        backend, eps = self.backend, self.architecture.norm_eps
        segments = self.cache.segments(batch)
        rope, dim = self.architecture.attention.rope, self.architecture.attention.head_dim
        angles = backend.rope_angles(batch.positions, theta=rope.theta, dim=dim)
        x = backend.embed(batch.tokens, self.embedding)
        for layer, cache in zip(self.layers, self.cache.layers, strict=True):
            normed = backend.rms_norm(x, layer.attention_norm, eps=eps)
            x = backend.add(x, layer.attention(backend, normed, angles, cache, segments))
            normed = backend.rms_norm(x, layer.feed_forward_norm, eps=eps)
            x = backend.add(x, (yield from layer.feed_forward.forward(backend, normed, exchange)))
        return backend.rms_norm(x[batch.wanted], self.norm, eps=eps)

    def logits(self, rows: Array) -> Array:
        """Logits of rows that `forward` returned (N, D) -> (N, V), in float32."""
        return self.backend.logits(rows, self.head)
