"""`alltoallv`: one nonblocking MPI_Ialltoallv per transfer."""

from typing import Any

from moempi.arrays import IntArray
from moempi.comm.transports.base import BufferedTransport, BufferReceipt


class Alltoallv(BufferedTransport):
    """All rows of a transfer in one collective."""

    name = "alltoallv"

    def send(self, outgoing: Any, counts: IntArray) -> None:
        """Only note the rows: the collective begins when this rank can receive."""
        self._sent = [outgoing, counts, self._row]

    def receive(self, incoming: Any, counts: IntArray) -> BufferReceipt:
        return BufferReceipt(self._comm.Ialltoallv(self._sent, [incoming, counts, self._row]), incoming)
