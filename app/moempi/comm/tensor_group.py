"""The tensor group of one lane: ranks that hold parts of each matrix and compute the same rows together.

Between the layers each rank holds only its part of the rows (a RowSplit). `all_gather` sends all rows to all ranks of
the group before a divided matrix, `reduce_scatter` adds up their partial results after it (Korthikanti et al. 2022,
sequence parallelism). So each row is dispatched to its experts by one rank only.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from mpi4py import MPI

from moempi.arrays import Float32Array, Int32Array, IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array, SampledTokens
from moempi.comm.transfers import Steps, Transfers, Waits, after_verbs
from moempi.comm.transports.buffers import BufferRing
from moempi.comm.transports.counted import IN_TENSOR_GROUP
from moempi.layout.row_split import RowSplit
from moempi.layout.schedule import Point


class TensorGroup:
    """A group of ranks that divide matrices. All methods are collective; methods with a `point` yield once, there.

    In a group of one rank they never yield. The ranks of `comm` are every `stride`-th rank of the run, from
    `first_rank` on.
    Each transfer is finished, and its verbs are submitted, before the next one starts on the same queue.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        backend: Backend,
        *,
        transfers: Transfers,
        width: int,
        first_rank: int = 0,
        stride: int = 1,
    ) -> None:
        self.size = comm.size
        self.part = comm.rank
        self._comm = comm
        self._backend = backend
        self._transfers = transfers
        self._ranks = range(first_rank, first_rank + comm.size * stride, stride)
        allocate = partial(backend.comm_buffer, width=width)
        self._outgoing, self._incoming = BufferRing(2, allocate), BufferRing(2, allocate)
        self._addends: tuple[Array, Array] | None = None
        self._row = MPI.BYTE.Create_contiguous(width * backend.row_dtype.itemsize).Commit()

    def all_gather(self, x: Array, split: RowSplit, point: Point) -> Waits[Array]:
        """All rows (T, D), in the batch's order, from each rank's part of them."""
        if self.size == 1:
            return x
        gathered = yield from self._transfers.start(self.rows_steps(x, split.counts)).received(point)
        return self._backend.unpack(gathered, split.by_row)

    def reduce_scatter(self, addends: Array, split: RowSplit, point: Point) -> Waits[Array]:
        """This rank's part of the sum over the group, in rank order, of partial results (T, D)."""
        if self.size == 1:
            return addends
        own = split.counts[self.part]
        parts = yield from self._transfers.start(self._all_to_all(addends, split, own)).received(point)
        return self._backend.combine(parts, *self._sum_of_parts(own))

    def counts_steps(self, counts: Sequence[int]) -> Steps[IntArray]:
        """The steps of an all-gather of the n `counts` of each rank; the value is (size, n)."""
        outgoing, incoming = np.array(counts, np.int64), np.empty((self.size, len(counts)), np.int64)
        yield self._comm.Iallgather(outgoing, incoming)
        return incoming

    def rows_steps(self, x: Array, counts: Sequence[int]) -> Steps[Array]:
        """The steps of an all-gather of rows; the value is a buffer of counts[i] rows of each rank i, in rank order."""
        outgoing, incoming = self._outgoing.take(counts[self.part]), self._incoming.take(sum(counts))
        self._backend.pack(x, None, outgoing)
        sent, received = [outgoing, len(outgoing), self._row], [incoming, list(counts), self._row]
        self._count([len(outgoing)] * self.size, self._row.size)
        yield from after_verbs(self._backend, partial(self._comm.Iallgatherv, sent, received))
        return incoming

    def slices_steps(
        self, slices: Float32Array, counts: Sequence[int], *, lengths: Sequence[int]
    ) -> Steps[Float32Array]:
        """The steps of an exchange of `slices` (sum(counts), lengths[part]) of all ranks' rows.

        The value is the complete rows of this rank (counts[part], sum(lengths)): rank i has a slice of lengths[i].
        """
        own, outgoing = counts[self.part], np.ascontiguousarray(slices, np.float32)
        incoming = np.empty(own * sum(lengths), np.float32)
        sent = [outgoing, [count * lengths[self.part] for count in counts], MPI.FLOAT]
        self._count(counts, lengths[self.part] * outgoing.itemsize)
        yield self._comm.Ialltoallv(sent, [incoming, [own * length for length in lengths], MPI.FLOAT])
        pieces = np.split(incoming, own * np.cumsum(lengths)[:-1])
        return np.concatenate(
            [piece.reshape(own, length) for piece, length in zip(pieces, lengths, strict=True)], axis=1
        )

    def merge_sampled(
        self, sampled: SampledTokens, rows_of_part: Sequence[IntArray], point: Point
    ) -> Waits[SampledTokens]:
        """The sampled tokens of all ranks, ordered by row; rank i has sampled for the rows rows_of_part[i]."""
        if self.size == 1:
            return sampled
        counts = list(map(len, rows_of_part))
        joined = yield from self._transfers.start(self._gather_sampled(sampled, counts)).received(point)
        return joined.take(np.argsort(np.concatenate(rows_of_part)))

    def _count(self, counts: Sequence[int], row_bytes: int) -> None:
        """Count the counts[i] rows that are sent to rank i of the group, except to this rank itself."""
        for part, count in enumerate(counts):
            if part != self.part:
                self._transfers.count_sent(IN_TENSOR_GROUP, self._ranks[part], count * row_bytes)

    def _sum_of_parts(self, own: int) -> tuple[Array, Array]:
        """The rows (own, size) that `combine` adds up, and weights of 1; kept, as all layers of a step need them."""
        if self._addends is None or len(self._addends[0]) != own:
            rows = np.arange(own)[:, None] + np.arange(self.size) * own
            self._addends = self._backend.upload(rows), self._backend.upload(np.ones(rows.shape, np.float32))
        return self._addends

    def _all_to_all(self, addends: Array, split: RowSplit, own: int) -> Steps[Array]:
        """The value is each rank's results for this rank's `own` rows, in rank order (own * size, D)."""
        outgoing, incoming = self._outgoing.take(sum(split.counts)), self._incoming.take(own * self.size)
        self._backend.pack(addends, split.by_part, outgoing)
        sent, received = [outgoing, list(split.counts), self._row], [incoming, [own] * self.size, self._row]
        self._count(split.counts, self._row.size)
        yield from after_verbs(self._backend, partial(self._comm.Ialltoallv, sent, received))
        return incoming

    def _gather_sampled(self, sampled: SampledTokens, counts: Sequence[int]) -> Steps[SampledTokens]:
        logprobs, top_logprobs = (_bits(values) for values in (sampled.logprobs[:, None], sampled.top_logprobs))
        outgoing = np.concatenate([sampled.tokens[:, None], logprobs, sampled.top_tokens, top_logprobs], axis=1)
        outgoing, width = outgoing.astype(np.int32, copy=False), outgoing.shape[1]
        incoming = np.empty((sum(counts), width), np.int32)
        received = [incoming, [count * width for count in counts], MPI.INT32_T]
        yield self._comm.Iallgatherv([outgoing, outgoing.size, MPI.INT32_T], received)
        tokens, logprobs, top_tokens, top_logprobs = np.split(incoming, [1, 2, 1 + width // 2], axis=1)
        return SampledTokens(tokens[:, 0], _floats(logprobs)[:, 0], top_tokens, _floats(top_logprobs))


def _bits(values: Float32Array) -> Int32Array:
    return np.ascontiguousarray(values, np.float32).view(np.int32)


def _floats(bits: Int32Array) -> Float32Array:
    return np.ascontiguousarray(bits).view(np.float32)
