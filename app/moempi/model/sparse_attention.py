"""Sparse attention (DeepSeek-V3.2, 2025): a row attends to the positions that an indexer has chosen for it.

Rows that see no more positions than an indexer chooses attend to all of them, without an indexer.
"""

from collections.abc import Sequence

import numpy as np
from msgspec import Struct

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array, Cache, Segment, Segments
from moempi.config.architecture import AttentionShape, Indexer
from moempi.model.rope import rope_angles


class SparseRows:
    """The rows of a step that see more than `top_k` positions, beside the other rows of the step.

    It keeps the positions that the last indexer chose, for the layers that share them.
    """

    def __init__(
        self,
        backend: Backend,
        attention: AttentionShape,
        segments: Sequence[Segment],
        capacities: IntArray,
        *,
        top_k: int,
    ) -> None:
        self._backend = backend
        self._dense, dense_rows = _parts(segments, 0, top_k)
        sparse, sparse_rows = _parts(segments, top_k, None)
        self._sparse = sparse if self._dense else segments  # the same ones share their layout in a backend
        order = np.argsort(np.concatenate([dense_rows, sparse_rows]), kind="stable")
        self._dense_rows, self._sparse_rows, self._order = map(backend.upload, (dense_rows, sparse_rows, order))
        positions = np.concatenate([one.start + np.arange(one.length) for one in sparse])
        self._angles = rope_angles(backend, attention, positions, capacities[sparse_rows])
        self._positions: Array | None = None

    def choose(self, indexer: "LightningIndexer", x: Array, latent: Array, index: Cache) -> None:
        """Choose the positions of the rows, from all rows x (T, D) and latent vectors of queries (T, rank)."""
        x, latent = self._of_sparse(x), self._of_sparse(latent)
        self._positions = indexer.choose(self._backend, x, latent, self._angles, index, self._sparse)

    def attend(self, queries: Array, cache: Cache, *, scale: float) -> Array:
        """Attention of all queries (T, H, dim), over the chosen positions or all of them -> (T, H, value dim)."""
        if self._positions is None:
            raise RuntimeError("no layer before this one has an indexer")
        backend, sparse = self._backend, self._of_sparse(queries)
        attended = backend.attend_selected(sparse, cache, self._sparse, self._positions, scale=scale)
        if not self._dense:
            return attended
        dense = backend.attend(backend.take_rows(queries, self._dense_rows), cache, self._dense, scale=scale)
        return backend.take_rows(backend.join([dense, attended]), self._order)

    def _of_sparse(self, x: Array) -> Array:
        return self._backend.take_rows(x, self._sparse_rows) if self._dense else x


class LightningIndexer(Struct, frozen=True):
    """Weights of one layer's indexer.

    `queries` maps the latent vector of queries to all heads, `keys` maps D to one key, which is normalized, and
    `weights` maps D to the weights of the heads. The factors of scores and weights are left out: being positive, they
    change no choice.
    """

    shape: Indexer
    queries: Array
    keys: Array
    key_norm: Array
    key_norm_bias: Array
    weights: Array

    def extend_cache(
        self, backend: Backend, x: Array, angles: Array, index: Cache, segments: Sequence[Segment]
    ) -> None:
        """Write the keys of rows x (T, D) to the cache."""
        keys = backend.linear(x, self.keys)
        keys = backend.layer_norm(keys, self.key_norm, self.key_norm_bias, eps=self.shape.norm_eps)
        keys = backend.rotate(keys[:, None, :], angles, interleaved=self.shape.interleaved)
        backend.extend_cache(index, keys, None, segments)

    def choose(
        self, backend: Backend, x: Array, latent: Array, angles: Array, index: Cache, segments: Sequence[Segment]
    ) -> Array:
        """The positions (T, top_k) of rows x (T, D), which all see more, with latent vectors of queries (T, rank)."""
        queries = backend.linear(latent, self.queries).reshape(len(x), self.shape.num_heads, self.shape.head_dim)
        queries = backend.rotate(queries, angles, interleaved=self.shape.interleaved)
        weights = backend.logits(x, self.weights)
        return backend.select_positions(queries, weights, index, segments, top_k=self.shape.top_k)


def sparse_rows(
    backend: Backend, attention: AttentionShape, segments: Sequence[Segment], capacities: IntArray
) -> SparseRows | None:
    """The rows of a step that see more positions than an indexer chooses; None if there are none.

    `capacities` (T,) are as for `rope_angles`.
    """
    if attention.indexer is None:
        return None
    step = Segments.of(segments)
    if (step.starts + step.lengths).max(initial=0, where=step.lengths > 0) <= attention.indexer.top_k:
        return None
    return SparseRows(backend, attention, segments, capacities, top_k=attention.indexer.top_k)


def _parts(segments: Sequence[Segment], first: int, end: int | None) -> tuple[tuple[Segment, ...], IntArray]:
    """The parts of segments at positions [first, end), with their rows numbered anew, and the number of each before."""
    parts: list[Segment] = []
    rows: list[IntArray] = [np.zeros(0, np.int64)]
    count = 0
    for segment in segments:
        start = max(segment.start, first)
        stop = segment.start + segment.length if end is None else min(segment.start + segment.length, end)
        if start < stop:
            parts.append(Segment(count, stop - start, start, segment.pages, segment.state))
            rows.append(np.arange(start, stop) + segment.row - segment.start)
            count += stop - start
    return tuple(parts), np.concatenate(rows)
