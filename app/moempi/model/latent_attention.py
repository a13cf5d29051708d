"""Multi-head latent attention over a cache of latent vectors (DeepSeek-V2, 2024, section 2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.backend.protocol import Array, Backend, Cache, RmsNorm, Segment
from moempi.config.architecture import AttentionShape, Latent
from moempi.model.sparse_attention import LightningIndexer, SparseRows


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Weights of one layer's latent attention, in the absorbed form: keys and values are never expanded.

    The cache holds, for each position, the normalized latent vector c and one rotated key r shared by all heads. A
    head's key is (A c | r) and its value is B c, so its score with a query (p | q) is (A'p) c + q r. `absorb_keys`
    (H, n, rank) holds each head's A, `expand_values` (H, rank, values) each head's B transposed. `queries` maps D, or
    the query latent, to all (p | q). With an `indexer`, or in a layer that shares the positions of an earlier one,
    attention is sparse.
    """

    shape: AttentionShape
    latent: Latent
    queries: Array
    key_value_latent: Array
    key_value_norm: Array
    absorb_keys: Array
    expand_values: Array
    output: Array
    query_latent: Array | None = None
    query_norm: Array | None = None
    query_bias: Array | None = None
    key_value_bias: Array | None = None
    output_bias: Array | None = None
    indexer: LightningIndexer | None = None

    def __call__(
        self,
        backend: Backend,
        x: Array,
        angles: Array,
        cache: Cache,
        segments: Sequence[Segment],
        sparse: SparseRows | None = None,
    ) -> Array:
        """Extend the cache by rows x (T, D), and attend them to their sequences' cached positions -> (T, D).

        `sparse` are the rows that attend to chosen positions, if there are any.
        """
        shape, num_rows = self.shape, len(x)
        latent = self._query_latent(backend, x)
        queries = backend.rotate_into_latent_cache(
            self._queries(backend, latent),
            self._keys(backend, x),
            angles,
            norm=RmsNorm(self.key_value_norm, self.latent.norm_eps),
            cache=cache,
            segments=segments,
            interleaved=shape.rope.interleaved,
        )
        scale = shape.head_dim**-0.5 * shape.score_factor
        if self.indexer is not None:
            if cache.index is None:
                raise RuntimeError("the cache has no keys for the indexer")
            self.indexer.extend_cache(backend, x, angles, cache.index, segments)
            if sparse is not None:
                sparse.choose(self.indexer, x, latent, cache.index)
        if sparse is None:
            mixed = backend.attend(queries, cache, segments, scale=scale)
        else:
            mixed = sparse.attend(queries, cache, scale=scale)
        attended = backend.linear_heads(mixed, self.expand_values)
        attended = attended.reshape(num_rows, shape.num_heads * shape.value_dim)
        return backend.linear(attended, self.output, self.output_bias)

    def _query_latent(self, backend: Backend, x: Array) -> Array:
        """The normalized latent vector of queries of each row, or the row if there is none."""
        if self.query_latent is None:
            return x
        latent = backend.linear(x, self.query_latent, self.query_bias)
        return backend.rms_norm(latent, self.query_norm, eps=self.latent.norm_eps)

    def _queries(self, backend: Backend, x: Array) -> tuple[Array, Array]:
        """Each head's absorbed query (T, H, rank), and its query before rotation (T, H, rope dim)."""
        queries = backend.linear(x, self.queries).reshape(len(x), self.shape.num_heads, self.shape.head_dim)
        plain = self.shape.head_dim - self.latent.rope_dim
        return backend.linear_heads(queries[..., :plain], self.absorb_keys), queries[..., plain:]

    def _keys(self, backend: Backend, x: Array) -> tuple[Array, Array]:
        """The latent vector before its norm (T, 1, rank) and the key before rotation (T, 1, rope dim) of each row."""
        both = backend.linear(x, self.key_value_latent, self.key_value_bias)[:, None, :]
        return both[..., : self.latent.key_value_rank], both[..., self.latent.key_value_rank :]
