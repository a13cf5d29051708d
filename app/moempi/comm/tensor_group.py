"""The tensor group of one lane: ranks that hold parts of each matrix and compute the same rows together.

Between the layers each rank keeps its part of the rows only (a RowSplit); `gather` brings all rows to all ranks of the
group before a divided matrix, `scatter` adds up their partial results after it (Korthikanti et al. 2022, sequence
parallelism). No row is routed to experts twice.
"""

from collections.abc import Generator, Sequence
from functools import partial

import numpy as np
from mpi4py import MPI

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend, SampledTokens
from moempi.comm.transfers import Transfers
from moempi.comm.transports.base import start_after_verbs
from moempi.layout.row_split import RowSplit, part_range
from moempi.layout.schedule import Point


class TensorGroup:
    """A rank's view of its group; alone it moves nothing and never yields. All methods are collective."""

    def __init__(self, comm: MPI.Intracomm, backend: Backend, *, transfers: Transfers, width: int) -> None:
        self.size = comm.size
        self.part = comm.rank
        self._comm = comm
        self._backend = backend
        self._transfers = transfers
        self._width = width
        self._row = MPI.BYTE.Create_contiguous(width * backend.row_dtype.itemsize).Commit()

    def all_gather(self, x: Array, split: RowSplit, *, layer: int) -> Generator[Point, None, Array]:
        """All rows (T, D), in the batch's order, from each rank's part."""
        if self.size == 1:
            return x
        outgoing = self._backend.comm_buffer(split.counts[self.part], self._width)
        self._backend.pack(x, None, outgoing)
        incoming = self._backend.comm_buffer(sum(split.counts), self._width)
        sent, received = [outgoing, len(outgoing), self._row], [incoming, list(split.counts), self._row]
        request = start_after_verbs(self._backend, partial(self._comm.Iallgatherv, sent, received))
        transfer = self._transfers.track(request, outgoing, incoming, waiting="exchange")
        yield Point(layer, "gather")
        return self._backend.unpack(transfer.finish(), split.by_row)

    def reduce_scatter(self, addends: Array, split: RowSplit, *, layer: int) -> Generator[Point, None, Array]:
        """This rank's part of the sum, over the group in rank order, of results (T, D)."""
        if self.size == 1:
            return addends
        own = split.counts[self.part]
        outgoing = self._backend.comm_buffer(sum(split.counts), self._width)
        self._backend.pack(addends, split.by_part, outgoing)
        incoming = self._backend.comm_buffer(own * self.size, self._width)
        sent, received = [outgoing, list(split.counts), self._row], [incoming, [own] * self.size, self._row]
        request = start_after_verbs(self._backend, partial(self._comm.Ialltoallv, sent, received))
        transfer = self._transfers.track(request, outgoing, incoming, waiting="exchange")
        yield Point(layer, "scatter")
        places = np.arange(own)[:, None] + np.arange(self.size) * own
        ones = np.ones(places.shape, np.float32)
        return self._backend.combine(transfer.finish(), self._backend.upload(places), self._backend.upload(ones))

    def all_gather_rows(self, x: Array, counts: Sequence[int]) -> Array:
        """The rows of all ranks, which bring `counts`, in rank order (sum(counts), D); blocks."""
        if self.size == 1 or not any(counts):
            return x
        outgoing = self._backend.comm_buffer(counts[self.part], self._width)
        self._backend.pack(x, None, outgoing)
        incoming = self._backend.comm_buffer(sum(counts), self._width)
        sent, received = [outgoing, len(outgoing), self._row], [incoming, list(counts), self._row]
        request = start_after_verbs(self._backend, partial(self._comm.Iallgatherv, sent, received))
        transfer = self._transfers.track(request, outgoing, incoming, waiting="exchange")
        return self._backend.unpack(transfer.finish(), None)

    def exchange_logits(self, parts: Array, counts: Sequence[int], *, length: int) -> Array:
        """This rank's rows, whole (counts[part], length), of float32 `parts`; blocks.

        `parts` (sum(counts), P) is each rank's part of all shared rows; row lengths are divided as `part_range` says.
        """
        if self.size == 1 or not any(counts):
            return parts
        lengths = [len(part_range(length, self.size, part)) for part in range(self.size)]
        own = counts[self.part]
        outgoing = np.ascontiguousarray(self._backend.download(parts), np.float32)
        incoming = np.empty(own * length, np.float32)
        sent = [outgoing, [count * lengths[self.part] for count in counts], MPI.FLOAT]
        request = self._comm.Ialltoallv(sent, [incoming, [own * part for part in lengths], MPI.FLOAT])
        self._transfers.track(request, outgoing, incoming, waiting="exchange").finish()
        pieces = np.split(incoming, own * np.cumsum(lengths)[:-1])
        rows = [piece.reshape(own, part) for piece, part in zip(pieces, lengths, strict=True)]
        return self._backend.upload(np.concatenate(rows, axis=1))

    def merge_sampled(self, sampled: SampledTokens, rows: IntArray) -> SampledTokens:
        """All ranks' picked rows, each put in its place; blocks."""
        if self.size == 1:
            return sampled
        parts = self._comm.allgather((sampled, rows))
        whole = SampledTokens.join([part for part, _ in parts])
        return whole.take(np.argsort(np.concatenate([where for _, where in parts])))
