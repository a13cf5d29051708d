"""`alltoallv`: one nonblocking MPI_Ialltoallv per transfer."""

from typing import Any

from moempi.arrays import IntArray
from moempi.comm.transports.base import BufferedTransport, BufferReceipt


class Alltoallv(BufferedTransport):
    """All rows of a transfer in one collective."""

    name = "alltoallv"

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> BufferReceipt:
        request = self._comm.Ialltoallv([outgoing, send_counts, self._row], [incoming, recv_counts, self._row])
        return BufferReceipt(request, incoming)
