"""Multi-head attention over a paged key-value cache."""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.backend.protocol import Array, Backend, Cache, Segment
from moempi.config import architecture


@dataclass(frozen=True, slots=True)
class Attention:
    """Weights of one layer's attention: `qkv` maps D to the heads' queries, keys and values, `output` back to D."""

    shape: architecture.Attention
    eps: float
    qkv: Array
    output: Array
    q_norm: Array | None = None
    k_norm: Array | None = None

    def __call__(self, backend: Backend, x: Array, angles: Array, cache: Cache, segments: Sequence[Segment]) -> Array:
        """Attend rows x (T, D) to all earlier positions of their sequences -> (T, D); extends the cache."""
        heads, kv_heads, dim = self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim
        qkv = backend.linear(x, self.qkv).reshape(len(x), heads + 2 * kv_heads, dim)
        queries, keys, values = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None:
            queries = backend.rms_norm(queries, self.q_norm, eps=self.eps)
            keys = backend.rms_norm(keys, self.k_norm, eps=self.eps)
        queries, keys = backend.rotate(queries, angles), backend.rotate(keys, angles)
        backend.extend_cache(cache, keys, values, segments)
        attended = backend.attend(queries, cache, segments, scale=dim**-0.5)
        return backend.linear(attended, self.output)
