"""Small collectives between the ranks of a stage."""

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from moempi.arrays import Int32Array, IntArray
from moempi.comm.transfers import IDLE, NO_REQUEST, Transfer, Transfers, complete


class StageComm:
    """Collectives of one lane between the ranks of this rank's stage. No call blocks."""

    def __init__(self, comm: MPI.Intracomm, transfers: Transfers) -> None:
        self.size = comm.size
        self.rank = comm.rank
        self._comm = comm
        self._transfers = transfers

    def iallreduce_sum(self, amounts: Sequence[int]) -> Transfer[IntArray]:
        """Start to add up amounts (n,) over the ranks; the transfer's value is the sums (n,). Collective."""
        own = np.array(amounts, np.int64)
        if self.size == 1:
            return self._transfers.start(complete(NO_REQUEST, own), waiting=IDLE)
        sums = np.empty(len(amounts), np.int64)
        request = self._comm.Iallreduce(own, sums)
        return self._transfers.start(complete(request, sums, own), waiting=IDLE)

    def ialltoallv(self, numbers: Int32Array, send_counts: IntArray, recv_counts: IntArray) -> Transfer[Int32Array]:
        """Start to send numbers, ordered by destination; the value is the received numbers, ordered by source.

        Counts (R,) are the numbers to and from each rank. Collective.
        """
        incoming = np.empty(int(recv_counts.sum()), np.int32)
        request = self._comm.Ialltoallv([numbers, send_counts, MPI.INT32_T], [incoming, recv_counts, MPI.INT32_T])
        return self._transfers.start(complete(request, incoming, numbers), waiting=IDLE)
