"""`pairwise`: one message for each pair of ranks that has rows to exchange, none for the others."""

from typing import Any

import numpy as np
from mpi4py import MPI
from msgspec import Struct

from moempi.arrays import IntArray
from moempi.comm.transports.base import BufferedTransport, BufferReceipt

TAGS = 1 << 14


class RequestGroup(Struct, frozen=True):
    """The sends and receives of one transfer, as one request."""

    requests: list[MPI.Request]

    def Test(self) -> bool:  # noqa: N802
        return bool(MPI.Request.Testall(self.requests))


class Pairwise(BufferedTransport):
    """Isend and Irecv for each other rank that has rows; `receive` copies this rank's rows for itself.

    Messages name the memory of a whole buffer and the first row, because mpi4py takes long to find the memory of an
    array, above all of one on a device.
    """

    name = "pairwise"
    _tag = 0
    _own: Any = None
    _sends: list[MPI.Request]

    def send(self, outgoing: Any, counts: IntArray) -> None:
        self._tag = (self._tag + 1) % TAGS
        self._sends, source = [], memory_of(outgoing)
        for rank, (first, last) in blocks(counts).items():
            if rank != self._comm.rank:
                self._sends.append(self._comm.Isend([source, (last - first, first), self._row], rank, self._tag))
            else:
                self._own = outgoing[first:last]

    def receive(self, incoming: Any, counts: IntArray) -> BufferReceipt:
        requests, target = self._sends, memory_of(incoming)
        for rank, (first, last) in blocks(counts).items():
            if rank != self._comm.rank:
                requests.append(self._comm.Irecv([target, (last - first, first), self._row], rank, self._tag))
            else:
                copy_rows(incoming, (first, last), self._own)
        return BufferReceipt(RequestGroup(requests), incoming)


def memory_of(buffer: Any) -> MPI.buffer | None:
    """The memory of a contiguous array, in a form that mpi4py takes without asking the array; None if it is empty."""
    return MPI.buffer.frombuffer(buffer) if len(buffer) else None


def blocks(counts: IntArray) -> dict[int, tuple[int, int]]:
    """The rows [first, last) of each rank that has any, in a buffer ordered by rank."""
    found, last = {}, 0
    for rank, count in enumerate(counts.tolist()):
        if count:
            found[rank] = (last, last + count)
            last += count
    return found


def copy_rows(incoming: Any, rows: tuple[int, int], block: Any) -> None:
    """Copy a block into rows [first, last) of a buffer, both of any element type."""
    first, last = rows
    incoming[first:last].reshape(-1).view(np.uint8)[:] = block.reshape(-1).view(np.uint8)
