"""Multi-head latent attention over a cache of latent vectors (DeepSeek-V2, 2024, section 2.1)."""

from collections.abc import Sequence

from msgspec import Struct

from moempi.backend.protocol import Backend
from moempi.backend.values import Array, Cache, RmsNorm, Segment
from moempi.config.architecture import AttentionShape, Latent
from moempi.model.sparse_attention import LightningIndexer, SparseRows


class LatentAttention(Struct, frozen=True):
    """Weights of one layer's latent attention, in the absorbed form: keys and values are never expanded.

    The cache holds, for each position, the normalized latent vector c and one rotated key r shared by all heads. A
    head's key is (A c | r) and its value is B c, so its score with a query (p | q) is (A'p) c + q r. `absorb_keys`
    (H, n, rank) holds each head's A, `expand_values` (H, rank, values) each head's B transposed. `down` maps D to the
    latent vector of queries, c before its norm and r before its rotation; `queries` maps the normalized latent vector
    of queries to all (p | q). In a model without latent vectors of queries `down` has all (p | q) in their place. With
    an `indexer`, or in a layer that shares the positions of an earlier one, attention is sparse.
    """

    shape: AttentionShape
    latent: Latent
    down: Array
    key_value_norm: Array
    absorb_keys: Array
    expand_values: Array
    output: Array
    queries: Array | None = None
    query_norm: Array | None = None
    down_bias: Array | None = None
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
        attended = backend.linear_heads(self._attend(backend, x, angles, cache, segments, sparse), self.expand_values)
        attended = attended.reshape(len(x), self.shape.num_heads * self.shape.value_dim)
        return backend.linear(attended, self.output, self.output_bias)

    def _attend(
        self,
        backend: Backend,
        x: Array,
        angles: Array,
        cache: Cache,
        segments: Sequence[Segment],
        sparse: SparseRows | None,
    ) -> Array:
        """The sums of latent vectors (T, H, rank) that the heads attend to; the memory of queries is free behind it."""
        shape, interleaved = self.shape, self.shape.rope.interleaved
        latent, queries = self._project(backend, x, angles, cache, segments)
        scale = shape.head_dim**-0.5 * shape.score_factor
        if self.indexer is not None:
            if cache.index is None:
                raise RuntimeError("the cache has no keys for the indexer")
            self.indexer.extend_cache(backend, x, angles, cache.index, segments)
            if sparse is not None:
                sparse.choose(self.indexer, x, latent, cache.index)
        if sparse is None:
            return backend.attend_latent(queries, angles, cache, segments, scale=scale, interleaved=interleaved)
        queries = backend.join_columns(queries[0], backend.rotate(queries[1], angles, interleaved=interleaved))
        return sparse.attend(queries, cache, scale=scale)

    def _project(
        self, backend: Backend, x: Array, angles: Array, cache: Cache, segments: Sequence[Segment]
    ) -> tuple[Array | None, tuple[Array, Array]]:
        """Extend the cache by the rows' keys; the normalized latent vectors of queries, if any, and the queries."""
        shape, latent = self.shape, self.latent
        first = latent.query_rank or shape.num_heads * shape.head_dim
        down = backend.linear(x, self.down, self.down_bias)
        of_keys = down[:, None, first:]
        normalized = backend.extend_latent_cache(
            (of_keys[..., : latent.key_value_rank], of_keys[..., latent.key_value_rank :]),
            angles,
            norm=RmsNorm(self.key_value_norm, latent.norm_eps),
            cache=cache,
            segments=segments,
            interleaved=shape.rope.interleaved,
            queries=(down[:, :first], RmsNorm(self.query_norm, latent.norm_eps)) if latent.query_rank else None,
        )
        queries = down[:, :first] if normalized is None else backend.linear(normalized, self.queries)
        return normalized, self._absorbed(backend, queries)

    def _absorbed(self, backend: Backend, queries: Array) -> tuple[Array, Array]:
        """Each head's absorbed query (T, H, rank), and its query before rotation (T, H, rope dim)."""
        queries = queries.reshape(len(queries), self.shape.num_heads, self.shape.head_dim)
        plain = self.shape.head_dim - self.latent.rope_dim
        return backend.linear_heads(queries[..., :plain], self.absorb_keys), queries[..., plain:]
