"""Multi-head attention over a paged key-value cache."""

from collections.abc import Sequence

from msgspec import Struct

from moempi.backend.protocol import Backend
from moempi.backend.values import Array, AttentionBlock, Cache, RmsNorm, Segment
from moempi.config.architecture import AttentionShape
from moempi.model.norm import Norm


class Attention(Struct, frozen=True):
    """Weights of one layer's attention: `qkv` maps D to the heads' queries, keys and values, `output` back to D.

    `window` is the number of last positions that a query sees, 0 for all. `gate` maps D to logits, whose sigmoids
    multiply the attended values. `norms_rounded` is whether head norms round before they multiply by the weight.
    """

    shape: AttentionShape
    eps: float
    qkv: Array
    output: Array
    qkv_bias: Array | None = None
    output_bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    sinks: Array | None = None
    gate: Array | None = None
    window: int = 0
    norms_rounded: bool = True

    def __call__(self, backend: Backend, x: Array, angles: Array, cache: Cache, segments: Sequence[Segment]) -> Array:
        """Extend the cache by rows x (T, D), and attend them to their sequences' cached positions -> (T, D)."""
        shape, num_rows = self.shape, len(x)
        queries = backend.rotate_into_cache(
            self._project(backend, x),
            angles,
            cache=cache,
            segments=segments,
            interleaved=shape.rope.interleaved,
            norms=self._head_norms(),
        )
        attended = backend.attend(queries, cache, segments, scale=self._scale, window=self.window, sinks=self.sinks)
        attended = attended.reshape(num_rows, shape.num_heads * shape.value_dim)
        if self.gate is not None:
            attended = backend.scale_by_sigmoid(attended, backend.linear(x, self.gate))
        return backend.linear(attended, self.output, self.output_bias)

    def block(self, norm: Norm, next_norm: Norm) -> AttentionBlock | None:
        """The attention between two norms of the residual stream; None if it has parts that a block has not."""
        shape, before, after = self.shape, norm.rms, next_norm.rms
        if not before or not after or shape.qk_norm == "vector" or shape.clip or self.gate is not None:
            return None
        return AttentionBlock(
            norm=before,
            qkv=self.qkv,
            qkv_bias=self.qkv_bias,
            head_norms=self._head_norms(),
            output=self.output,
            output_bias=self.output_bias,
            next_norm=after,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            interleaved=shape.rope.interleaved,
            scale=self._scale,
            window=self.window,
            sinks=self.sinks,
        )

    @property
    def _scale(self) -> float:
        return float(self.shape.head_dim**-0.5 * self.shape.score_factor)

    def _head_norms(self) -> tuple[RmsNorm, RmsNorm] | None:
        """The norms of each head of queries and of keys, if the model has them."""
        if self.shape.qk_norm != "head":
            return None
        q_norm, k_norm = (RmsNorm(weight, self.eps, self.norms_rounded) for weight in (self.q_norm, self.k_norm))
        return q_norm, k_norm

    def _project(self, backend: Backend, x: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values by head, normalized as vectors and clipped, before rotation."""
        shape, num_rows = self.shape, len(x)
        query_rows, kv_rows = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        qkv = backend.linear(x, self.qkv, self.qkv_bias)
        if shape.qk_norm != "vector" and not shape.clip:
            heads = qkv.reshape(num_rows, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
            first, last = shape.num_heads, shape.num_heads + shape.num_kv_heads
            return heads[:, :first], heads[:, first:last], heads[:, last:]
        queries, keys, values = qkv[:, :query_rows], qkv[:, query_rows:-kv_rows], qkv[:, -kv_rows:]
        if shape.qk_norm == "vector":
            queries = backend.rms_norm(queries, self.q_norm, eps=self.eps)
            keys = backend.rms_norm(keys, self.k_norm, eps=self.eps)
        if shape.clip:
            queries, keys, values = (backend.clip(part, shape.clip) for part in (queries, keys, values))
        queries = queries.reshape(num_rows, shape.num_heads, shape.head_dim)
        keys = keys.reshape(num_rows, shape.num_kv_heads, shape.head_dim)
        return queries, keys, values.reshape(num_rows, shape.num_kv_heads, shape.head_dim)
