"""Checking: another transport's rows, each block of them with its number of rows and checksum, told by the sender."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI
from xxhash import xxh3_64_intdigest

from moempi.arrays import IntArray
from moempi.comm.transports.base import MpiRequest, Receipt, Transport
from moempi.errors import DataError


class Verified:
    """A transport whose rows are compared on arrival with what their sender saw.

    It costs a second, small message per pair of ranks, and a pass over all rows at both ends.
    """

    def __init__(self, transport: Transport, comm: MPI.Intracomm) -> None:
        self.name = transport.name
        self._transport = transport
        self._comm = comm.Dup()

    def outgoing(self, rows: int) -> Any:
        return self._transport.outgoing(rows)

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> "CheckedReceipt":
        """See `Transport.start`. Completing it raises DataError that names both ranks when rows or counts differ."""
        seals = _seals(outgoing, send_counts)
        theirs = np.empty_like(seals)
        told = self._comm.Ialltoall(seals, theirs)
        landing = self._transport.start(outgoing, send_counts, incoming, recv_counts)
        return CheckedReceipt(landing, told, seals, theirs, recv_counts, self._comm.rank)


@dataclass(slots=True)
class CheckedReceipt:
    """Rows under way, beside the seals (R, 2) of their senders."""

    receipt: Receipt
    seals_request: MpiRequest
    sent: npt.NDArray[np.uint64]
    expected: npt.NDArray[np.uint64]
    counts: IntArray
    rank: int
    checked: bool = False

    def Test(self) -> bool:  # noqa: N802
        """Make progress; whether it is complete, and then as it should be."""
        if not self.checked and self.receipt.Test() and self.seals_request.Test():
            self._compare()
        return self.checked

    def Wait(self) -> None:  # noqa: N802
        """Block until complete and as it should be."""
        self.receipt.Wait()
        self.seals_request.Wait()
        self._compare()

    def rows(self) -> tuple[Any, IntArray | None]:
        return self.receipt.rows()

    def release(self) -> None:
        self.receipt.release()

    def _compare(self) -> None:
        received, places = self.receipt.rows()
        found = _seals(received if places is None else received[places], self.counts)
        for peer in np.flatnonzero((found != self.expected).any(axis=1)).tolist():
            (rows, _), (sent, _) = found[peer].tolist(), self.expected[peer].tolist()
            what = f"{sent} rows were sent, {rows} expected" if rows != sent else f"{rows} rows changed on the way"
            raise DataError(f"from rank {peer} to rank {self.rank} of a stage: {what}")
        self.checked = True


def _seals(rows: Any, counts: IntArray) -> npt.NDArray[np.uint64]:
    """The number of rows of each rank's block, and their checksum (R, 2)."""
    ends = np.concatenate([[0], np.cumsum(counts)])
    blocks = (np.ascontiguousarray(rows[first:last]) for first, last in pairwise(ends.tolist()))
    digests = [xxh3_64_intdigest(block.data) for block in blocks]
    return np.array([counts, digests], np.uint64).T.copy()
