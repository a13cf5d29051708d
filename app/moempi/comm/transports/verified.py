"""Checking: another transport's rows are compared on receipt with the counts and checksums that their senders sent."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI
from xxhash import xxh3_64_intdigest

from moempi.arrays import IntArray
from moempi.comm.transports.base import Completion, ReceiptWrapper, Transport, TransportWrapper
from moempi.errors import DataError


class Verified(TransportWrapper):
    """A transport that sends the number of rows and a checksum along with each block of rows.

    This costs a second, small message per pair of ranks, and a pass over all rows at both ends.
    """

    def __init__(self, transport: Transport, comm: MPI.Intracomm) -> None:
        super().__init__(transport)
        self._comm = comm.Dup()

    def free(self) -> None:
        self._comm.Free()
        super().free()

    def send(self, outgoing: Any, counts: IntArray) -> None:
        self._sent = _checksums(outgoing, counts)
        self._expected = np.empty_like(self._sent)
        self._request = self._comm.Ialltoall(self._sent, self._expected)
        self._transport.send(outgoing, counts)

    def receive(self, incoming: Any, counts: IntArray) -> "CheckedReceipt":
        """Completing the receipt raises DataError, which names both ranks, if rows or counts differ."""
        receipt = self._transport.receive(incoming, counts)
        return CheckedReceipt(receipt, self._request, self._sent, self._expected, counts, self._comm.rank)


@dataclass(slots=True)
class CheckedReceipt(ReceiptWrapper):
    """A receipt that is complete once its rows are received and equal the checksums `expected` (R, 2).

    `request` exchanges the checksums and reads `sent`; `counts` (R,) are the rows from each rank.
    """

    request: Completion
    sent: npt.NDArray[np.uint64]
    expected: npt.NDArray[np.uint64]
    counts: IntArray
    rank: int
    checked: bool = False

    def Test(self) -> bool:  # noqa: N802
        if not self.checked and self.receipt.Test() and self.request.Test():
            self._compare()
        return self.checked

    def _compare(self) -> None:
        buffer, index = self.receipt.rows()
        found = _checksums(buffer if index is None else buffer[index], self.counts)
        for source in np.flatnonzero((found != self.expected).any(axis=1)).tolist():
            (rows, _), (sent, _) = found[source].tolist(), self.expected[source].tolist()
            what = f"{sent} rows were sent, {rows} expected" if rows != sent else f"{rows} rows changed on the way"
            raise DataError(f"from rank {source} to rank {self.rank} of a stage: {what}")
        self.checked = True


def _checksums(rows: Any, counts: IntArray) -> npt.NDArray[np.uint64]:
    """The number of rows in each rank's block, and the block's checksum (R, 2)."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    blocks = (np.ascontiguousarray(rows[first:last]) for first, last in pairwise(ends.tolist()))
    digests = [xxh3_64_intdigest(block.data) for block in blocks]
    return np.array([counts, digests], np.uint64).T.copy()
