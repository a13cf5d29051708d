"""The ranks that divide the LM head: a tensor group, or all tensor groups of the last stage.

Rows and logits of several groups travel in two levels: inside a tensor group, and between the ranks that have the same
index in theirs. So a rank sends a message to each other group, not to each rank of the stage.
"""

from collections.abc import Sequence

import numpy as np

from moempi.arrays import Float32Array, IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import Steps, Transfers, Waits, downloaded
from moempi.layout.row_split import part_range
from moempi.layout.schedule import Point


class HeadGroup:
    """G tensor groups of T ranks that divide the LM head, of which this rank is in one.

    `tensor` is this rank's tensor group, and `across` are the ranks of all groups with its index, in the order of the
    groups. The rank of index t in group g has part g * T + t of the vocabulary, which `part_range` divides.
    All methods are collective and yield at most once, at `point`.
    """

    def __init__(self, tensor: TensorGroup, across: TensorGroup, backend: Backend, *, transfers: Transfers) -> None:
        self.size = tensor.size * across.size
        self._tensor = tensor
        self._across = across
        self._backend = backend
        self._transfers = transfers

    def all_gather_counts(self, counts: Sequence[int], point: Point) -> Waits[IntArray]:
        """The numbers of rows of all ranks (G, T), from the `counts` (T,) of each tensor group."""
        if self._across.size == 1:
            return np.array([counts], np.int64)
        return (yield from self._transfers.start(self._across.counts_steps(counts)).received(point))

    def all_gather_rows(self, x: Array, counts: IntArray, point: Point) -> Waits[Array]:
        """The rows of all ranks (sum(counts), D), in the order of indices, then of groups; counts (G, T)."""
        if self.size == 1:
            return x
        gathered = yield from self._transfers.start(self._all_gather(x, counts)).received(point)
        return self._backend.unpack(gathered, None)

    def exchange_logits(self, logits: Array, counts: IntArray, *, vocab_size: int, point: Point) -> Waits[Array]:
        """Complete logits (N, V) of this rank's rows; counts (G, T).

        `logits` (sum(counts), own part of V) float32 are the logits of all ranks' rows, in the order in which they are
        gathered, for this rank's part of the vocabulary.
        """
        if self.size == 1:
            return logits
        steps = self._exchange(logits, counts, vocab_size)
        del logits  # freed once it is on the host
        return self._backend.upload((yield from self._transfers.start(steps).received(point)))

    def _all_gather(self, x: Array, counts: IntArray) -> Steps[Array]:
        if self._across.size > 1:
            gathered = yield from self._across.rows_steps(x, counts[:, self._tensor.part].tolist())
            if self._tensor.size == 1:
                return gathered
            x = self._backend.unpack(gathered, None)
        return (yield from self._tensor.rows_steps(x, counts.sum(axis=0).tolist()))

    def _exchange(self, logits: Array, counts: IntArray, vocab_size: int) -> Steps[Float32Array]:
        lengths = np.array([len(part_range(vocab_size, self.size, part)) for part in range(self.size)])
        lengths = lengths.reshape(counts.shape)
        (slices,) = yield from downloaded(self._backend, logits)
        del logits
        if self._tensor.size > 1:
            of_group = lengths[self._across.part].tolist()
            slices = yield from self._tensor.slices_steps(slices, counts.sum(axis=0).tolist(), lengths=of_group)
        if self._across.size > 1:
            of_groups = lengths.sum(axis=1).tolist()
            slices = yield from self._across.slices_steps(
                slices, counts[:, self._tensor.part].tolist(), lengths=of_groups
            )
        return slices
