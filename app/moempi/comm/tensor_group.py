"""The tensor group of one lane: ranks that hold parts of each matrix and compute the same rows together.

Between the layers each rank holds only its part of the rows (a RowSplit). `all_gather` sends all rows to all ranks of
the group before a divided matrix, `reduce_scatter` adds up their partial results after it (Korthikanti et al. 2022,
sequence parallelism). So each row is dispatched to its experts by one rank only.

The LM head is divided in the tensor group, or in a group of the same kind that is the whole last stage.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from mpi4py import MPI

from moempi.arrays import Float32Array, Int32Array, IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array, SampledTokens
from moempi.comm.transfers import Steps, Transfers, Waits, after_verbs, downloaded
from moempi.comm.transports.buffers import BufferRing
from moempi.comm.transports.counted import IN_TENSOR_GROUP
from moempi.layout.row_split import RowSplit, part_range
from moempi.layout.schedule import Point


class TensorGroup:
    """A group of ranks that divide matrices: a tensor group, or for the LM head also the last stage.

    All methods are collective and yield once, at `point`; in a group of one rank, never.

    The ranks of `comm` are consecutive ranks of the run, from `first_rank` on.
    Each transfer is finished, and its verbs are submitted, before the next one starts on the same queue.
    """

    def __init__(
        self, comm: MPI.Intracomm, backend: Backend, *, transfers: Transfers, width: int, first_rank: int = 0
    ) -> None:
        self.size = comm.size
        self.part = comm.rank
        self._comm = comm
        self._backend = backend
        self._transfers = transfers
        self._first_rank = first_rank
        allocate = partial(backend.comm_buffer, width=width)
        self._outgoing, self._incoming = BufferRing(2, allocate), BufferRing(2, allocate)
        self._addends: tuple[Array, Array] | None = None
        self._row = MPI.BYTE.Create_contiguous(width * backend.row_dtype.itemsize).Commit()

    def all_gather(self, x: Array, split: RowSplit, point: Point) -> Waits[Array]:
        """All rows (T, D), in the batch's order, from each rank's part of them."""
        if self.size == 1:
            return x
        gathered = yield from self._transfers.start(self._all_gather(x, split.counts)).received(point)
        return self._backend.unpack(gathered, split.by_row)

    def reduce_scatter(self, addends: Array, split: RowSplit, point: Point) -> Waits[Array]:
        """This rank's part of the sum over the group, in rank order, of partial results (T, D)."""
        if self.size == 1:
            return addends
        own = split.counts[self.part]
        parts = yield from self._transfers.start(self._all_to_all(addends, split, own)).received(point)
        return self._backend.combine(parts, *self._sum_of_parts(own))

    def all_gather_counts(self, own: int, point: Point) -> Waits[list[int]]:
        """The number of rows of each rank in rank order; this rank has `own` rows."""
        if self.size == 1:
            return [own]
        return (yield from self._transfers.start(self._all_gather_counts(own)).received(point))

    def all_gather_rows(self, x: Array, counts: Sequence[int], point: Point) -> Waits[Array]:
        """The rows of all ranks in rank order (sum(counts), D); rank i has counts[i] rows."""
        if self.size == 1:
            return x
        gathered = yield from self._transfers.start(self._all_gather(x, counts)).received(point)
        return self._backend.unpack(gathered, None)

    def exchange_logits(self, logits: Array, counts: Sequence[int], *, vocab_size: int, point: Point) -> Waits[Array]:
        """Complete logits (counts[part], V) of this rank's rows.

        `logits` (sum(counts), own part of V) float32 are the logits of all ranks' rows for this rank's part of the
        vocabulary, which `part_range` divides.
        """
        if self.size == 1:
            return logits
        lengths = [len(part_range(vocab_size, self.size, part)) for part in range(self.size)]
        steps = self._exchange_logits(logits, counts, lengths=lengths)
        return self._backend.upload((yield from self._transfers.start(steps).received(point)))

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
                self._transfers.count_sent(IN_TENSOR_GROUP, self._first_rank + part, count * row_bytes)

    def _sum_of_parts(self, own: int) -> tuple[Array, Array]:
        """The rows (own, size) that `combine` adds up, and weights of 1; kept, as all layers of a step need them."""
        if self._addends is None or len(self._addends[0]) != own:
            rows = np.arange(own)[:, None] + np.arange(self.size) * own
            self._addends = self._backend.upload(rows), self._backend.upload(np.ones(rows.shape, np.float32))
        return self._addends

    def _all_gather_counts(self, own: int) -> Steps[list[int]]:
        outgoing, counts = np.array([own], np.int64), np.empty(self.size, np.int64)
        yield self._comm.Iallgather(outgoing, counts)
        return counts.tolist()

    def _all_gather(self, x: Array, counts: Sequence[int]) -> Steps[Array]:
        outgoing, incoming = self._outgoing.take(counts[self.part]), self._incoming.take(sum(counts))
        self._backend.pack(x, None, outgoing)
        sent, received = [outgoing, len(outgoing), self._row], [incoming, list(counts), self._row]
        self._count([len(outgoing)] * self.size, self._row.size)
        yield from after_verbs(self._backend, partial(self._comm.Iallgatherv, sent, received))
        return incoming

    def _all_to_all(self, addends: Array, split: RowSplit, own: int) -> Steps[Array]:
        """The value is each rank's results for this rank's `own` rows, in rank order (own * size, D)."""
        outgoing, incoming = self._outgoing.take(sum(split.counts)), self._incoming.take(own * self.size)
        self._backend.pack(addends, split.by_part, outgoing)
        sent, received = [outgoing, list(split.counts), self._row], [incoming, [own] * self.size, self._row]
        self._count(split.counts, self._row.size)
        yield from after_verbs(self._backend, partial(self._comm.Ialltoallv, sent, received))
        return incoming

    def _exchange_logits(self, logits: Array, counts: Sequence[int], *, lengths: Sequence[int]) -> Steps[Float32Array]:
        own = counts[self.part]
        (on_host,) = yield from downloaded(self._backend, logits)
        outgoing, incoming = np.ascontiguousarray(on_host, np.float32), np.empty(own * sum(lengths), np.float32)
        sent = [outgoing, [count * lengths[self.part] for count in counts], MPI.FLOAT]
        self._count(counts, lengths[self.part] * outgoing.itemsize)
        yield self._comm.Ialltoallv(sent, [incoming, [own * length for length in lengths], MPI.FLOAT])
        pieces = np.split(incoming, own * np.cumsum(lengths)[:-1])
        return np.concatenate(
            [piece.reshape(own, length) for piece, length in zip(pieces, lengths, strict=True)], axis=1
        )

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
