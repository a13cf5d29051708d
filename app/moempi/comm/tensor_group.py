"""The tensor group of one lane: ranks that hold parts of each matrix and compute the same rows together.

Between the layers each rank holds only its part of the rows (a RowSplit). `all_gather` sends all rows to all ranks of
the group before a divided matrix, `reduce_scatter` adds up their partial results after it (Korthikanti et al. 2022,
sequence parallelism). So each row is dispatched to its experts by one rank only.
"""

from collections.abc import Generator, Sequence
from functools import partial

import numpy as np
from mpi4py import MPI

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend, SampledTokens
from moempi.comm.transfers import Steps, Transfer, Transfers, after_verbs, complete
from moempi.comm.transports.buffers import BufferRing
from moempi.layout.row_split import RowSplit, part_range
from moempi.layout.schedule import TENSOR_PHASES, Point

GATHER, SCATTER = TENSOR_PHASES


class TensorGroup:
    """A rank's tensor group. All methods are collective; in a group of one rank they send nothing and never yield.

    Each transfer is finished, and its verbs are submitted, before the next one starts on the same queue.
    """

    def __init__(self, comm: MPI.Intracomm, backend: Backend, *, transfers: Transfers, width: int) -> None:
        self.size = comm.size
        self.part = comm.rank
        self._comm = comm
        self._backend = backend
        self._transfers = transfers
        allocate = partial(backend.comm_buffer, width=width)
        self._outgoing, self._incoming = BufferRing(2, allocate), BufferRing(2, allocate)
        self._addends: tuple[Array, Array] | None = None
        self._row = MPI.BYTE.Create_contiguous(width * backend.row_dtype.itemsize).Commit()

    def all_gather(self, x: Array, split: RowSplit, *, layer: int) -> Generator[Point, None, Array]:
        """All rows (T, D), in the batch's order, from each rank's part of them."""
        if self.size == 1:
            return x
        transfer = self._start_all_gather(x, split.counts)
        yield Point(layer, GATHER)
        return self._backend.unpack(transfer.finish(), split.by_row)

    def reduce_scatter(self, addends: Array, split: RowSplit, *, layer: int) -> Generator[Point, None, Array]:
        """This rank's part of the sum over the group, in rank order, of partial results (T, D)."""
        if self.size == 1:
            return addends
        own = split.counts[self.part]
        transfer = self._transfers.start(self._all_to_all(addends, split, own), waiting="exchange")
        yield Point(layer, SCATTER)
        return self._backend.combine(transfer.finish(), *self._sum_of_parts(own))

    def all_gather_rows(self, x: Array, counts: Sequence[int]) -> Array:
        """The rows of all ranks in rank order (sum(counts), D); rank i has counts[i] rows. Blocks."""
        if self.size == 1 or not any(counts):
            return x
        return self._backend.unpack(self._start_all_gather(x, counts).finish(), None)

    def exchange_logits(self, logits: Array, counts: Sequence[int], *, vocab_size: int) -> Array:
        """Complete logits (counts[part], V) of this rank's rows; blocks.

        `logits` (sum(counts), own part of V) float32 are the logits of all ranks' rows for this rank's part of the
        vocabulary, which `part_range` divides.
        """
        if self.size == 1 or not any(counts):
            return logits
        lengths = [len(part_range(vocab_size, self.size, part)) for part in range(self.size)]
        own = counts[self.part]
        outgoing = np.ascontiguousarray(self._backend.download(logits), np.float32)
        incoming = np.empty(own * vocab_size, np.float32)
        sent = [outgoing, [count * lengths[self.part] for count in counts], MPI.FLOAT]
        request = self._comm.Ialltoallv(sent, [incoming, [own * length for length in lengths], MPI.FLOAT])
        self._transfers.start(complete(request, incoming, outgoing), waiting="exchange").finish()
        pieces = np.split(incoming, own * np.cumsum(lengths)[:-1])
        rows = [piece.reshape(own, length) for piece, length in zip(pieces, lengths, strict=True)]
        return self._backend.upload(np.concatenate(rows, axis=1))

    def merge_sampled(self, sampled: SampledTokens, rows: IntArray) -> SampledTokens:
        """The sampled tokens of all ranks, ordered by row; `rows` (n,) are the rows of this rank's tokens. Blocks."""
        if self.size == 1:
            return sampled
        parts = self._comm.allgather((sampled, rows))
        joined = SampledTokens.join([part for part, _ in parts])
        return joined.take(np.argsort(np.concatenate([rows_of_part for _, rows_of_part in parts])))

    def _sum_of_parts(self, own: int) -> tuple[Array, Array]:
        """The rows (own, size) that `combine` adds up, and weights of 1; kept, as all layers of a step need them."""
        if self._addends is None or len(self._addends[0]) != own:
            rows = np.arange(own)[:, None] + np.arange(self.size) * own
            self._addends = self._backend.upload(rows), self._backend.upload(np.ones(rows.shape, np.float32))
        return self._addends

    def _start_all_gather(self, x: Array, counts: Sequence[int]) -> Transfer[Array]:
        return self._transfers.start(self._all_gather(x, counts), waiting="exchange")

    def _all_gather(self, x: Array, counts: Sequence[int]) -> Steps[Array]:
        outgoing, incoming = self._outgoing.take(counts[self.part]), self._incoming.take(sum(counts))
        self._backend.pack(x, None, outgoing)
        sent, received = [outgoing, len(outgoing), self._row], [incoming, list(counts), self._row]
        yield from after_verbs(self._backend, partial(self._comm.Iallgatherv, sent, received))
        return incoming

    def _all_to_all(self, addends: Array, split: RowSplit, own: int) -> Steps[Array]:
        """The value is each rank's results for this rank's `own` rows, in rank order (own * size, D)."""
        outgoing, incoming = self._outgoing.take(sum(split.counts)), self._incoming.take(own * self.size)
        self._backend.pack(addends, split.by_part, outgoing)
        sent, received = [outgoing, list(split.counts), self._row], [incoming, [own] * self.size, self._row]
        yield from after_verbs(self._backend, partial(self._comm.Ialltoallv, sent, received))
        return incoming
