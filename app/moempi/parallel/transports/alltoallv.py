"""`alltoallv`: one nonblocking MPI_Ialltoallv a transfer, on the backend's own buffers."""

from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

IntArray = npt.NDArray[np.integer]


class Alltoallv:
    """Rows of a fixed width as one MPI datatype, so that counts are rows and never overflow an int."""

    name = "alltoallv"

    def __init__(self, comm: MPI.Intracomm, *, row_bytes: int) -> None:
        self._comm = comm
        self._row = MPI.BYTE.Create_contiguous(row_bytes).Commit()

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> MPI.Request:
        """See `Transport.start`."""
        return self._comm.Ialltoallv([outgoing, send_counts, self._row], [incoming, recv_counts, self._row])
