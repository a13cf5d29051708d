"""`alltoallv`: one nonblocking MPI_Ialltoallv a transfer."""

from collections.abc import Callable
from functools import partial
from typing import Any

from mpi4py import MPI

from moempi.arrays import IntArray, aligned_rows
from moempi.comm.transports.base import BufferReceipt
from moempi.comm.transports.buffers import BufferRing


class Alltoallv:
    """Rows of a fixed width as one MPI datatype, so that counts are rows and never overflow an int.

    `allocate(rows)` makes its buffers, on the host by default.
    """

    name = "alltoallv"

    def __init__(self, comm: MPI.Intracomm, *, row_bytes: int, allocate: Callable[[int], Any] | None = None) -> None:
        self._comm = comm
        self._row = MPI.BYTE.Create_contiguous(row_bytes).Commit()
        self._buffers = BufferRing(2, allocate or partial(aligned_rows, row_bytes=row_bytes))

    def outgoing(self, rows: int) -> Any:
        return self._buffers.take(rows)

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> BufferReceipt:
        request = self._comm.Ialltoallv([outgoing, send_counts, self._row], [incoming, recv_counts, self._row])
        return BufferReceipt(request, incoming)
