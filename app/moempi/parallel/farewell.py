"""Last words between ranks: that the program's end is told already, and where each rank stands when none moves on.

Spoken from the watchdog's thread, while the main thread may sit in a blocked MPI call: over a communicator of its own.
"""

import time
from collections.abc import Iterable

from mpi4py import MPI

from moempi.parallel.stall import Position

TOLD_TAG = 1
POSITION_TAG = 2
LOOKS = 10
LOOK_EVERY_S = 0.005


class Farewell:
    """Messages of a rank about the end, to rank 0 and to `peers`; safe from any thread. Making one is collective."""

    def __init__(self, comm: MPI.Intracomm, peers: Iterable[int]) -> None:
        self._comm = comm.Dup()
        self._hearers = [rank for rank in dict.fromkeys([0, *peers]) if rank != comm.rank]

    def tell(self) -> None:
        """Say that this rank has told the cause, so that others keep silent."""
        for rank in self._hearers:
            self._comm.isend(None, rank, TOLD_TAG)

    def told(self) -> bool:
        """Whether another rank has told the cause."""
        for _ in range(LOOKS):
            if self._comm.Iprobe(tag=TOLD_TAG):
                return True
            time.sleep(LOOK_EVERY_S)  # a message arrives only inside MPI calls: look again
        return False

    def report(self, position: Position, rank: int) -> None:
        """Send this rank's position to another."""
        self._comm.isend(position, rank, POSITION_TAG)

    def collect(self, own: Position, *, patience_s: float) -> dict[int, Position]:
        """The positions of this rank and of those that report within `patience_s`, or of all."""
        positions = {self._comm.rank: own}
        end = time.monotonic() + patience_s
        while len(positions) < self._comm.size and time.monotonic() < end:
            status = MPI.Status()
            if self._comm.Iprobe(tag=POSITION_TAG, status=status):
                positions[status.source] = self._comm.recv(source=status.source, tag=POSITION_TAG)
            else:
                time.sleep(LOOK_EVERY_S)
        return positions
