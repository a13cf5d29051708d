"""`pairwise`: one message for each pair of ranks that has rows to exchange, none for the others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from mpi4py import MPI

from moempi.arrays import IntArray, aligned_rows
from moempi.comm.transports.base import BufferReceipt
from moempi.comm.transports.buffers import BufferRing

TAGS = 1 << 14


@dataclass(frozen=True, slots=True)
class RequestGroup:
    """The sends and receives of one transfer, as one request."""

    requests: list[MPI.Request]

    def Test(self) -> bool:  # noqa: N802
        return bool(MPI.Request.Testall(self.requests))

    def Wait(self) -> None:  # noqa: N802
        MPI.Request.Waitall(self.requests)


class Pairwise:
    """Isend and Irecv for each peer with rows; the block of a rank for itself is copied at once.

    `allocate(rows)` makes its buffers, on the host by default.
    """

    name = "pairwise"

    def __init__(self, comm: MPI.Intracomm, *, row_bytes: int, allocate: Callable[[int], Any] | None = None) -> None:
        self._comm = comm
        self._row = MPI.BYTE.Create_contiguous(row_bytes).Commit()
        self._buffers = BufferRing(2, allocate or partial(aligned_rows, row_bytes=row_bytes))
        self._tag = 0

    def outgoing(self, rows: int) -> Any:
        return self._buffers.take(rows)

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> BufferReceipt:
        self._tag = (self._tag + 1) % TAGS
        requests = []
        landings = blocks(recv_counts)
        for rank, (first, last) in landings.items():
            if rank != self._comm.rank:
                requests.append(self._comm.Irecv([incoming[first:last], last - first, self._row], rank, self._tag))
        for rank, (first, last) in blocks(send_counts).items():
            if rank != self._comm.rank:
                requests.append(self._comm.Isend([outgoing[first:last], last - first, self._row], rank, self._tag))
            else:
                copy_rows(incoming, landings[rank], outgoing[first:last])
        return BufferReceipt(RequestGroup(requests), incoming)


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
