"""Last words between ranks: that the program's end is told already, and where each rank stands when none moves on.

Spoken from the watchdog's thread, while the main thread may sit in a blocked MPI call: over a communicator of its own.
"""

import time
from collections.abc import Callable, Iterable

from mpi4py import MPI

from moempi.runtime.hang import Position

ANNOUNCE_TAG = 1
QUERY_TAG = 2
POSITION_TAG = 3
NUM_POLLS = 10
POLL_INTERVAL_S = 0.005


class AbortChannel:
    """Messages of a rank about the end, to rank 0 and to `peers`; safe from any thread. Making one is collective.

    `position` says where this rank stands, for who asks.
    """

    def __init__(self, comm: MPI.Intracomm, peers: Iterable[int], position: Callable[[], Position]) -> None:
        self._comm = comm.Dup()
        self._position = position
        self._sent: list[MPI.Request] = []
        self._receivers = [rank for rank in dict.fromkeys([0, *peers]) if rank != comm.rank]

    def announce(self) -> None:
        """Say that this rank has told the cause, so that others keep silent."""
        for rank in self._receivers:
            self._send(rank, ANNOUNCE_TAG, None)

    def announced(self) -> bool:
        """Whether another rank has told the cause."""
        for _ in range(NUM_POLLS):
            if self._comm.Iprobe(tag=ANNOUNCE_TAG):
                return True
            time.sleep(POLL_INTERVAL_S)  # a message arrives only inside MPI calls: look again
        return False

    def query_positions(self, ranks: Iterable[int], *, patience_s: float) -> dict[int, Position]:
        """Where those of `ranks` stand that answer within `patience_s`. Blocks for that long, or until all have."""
        wanted = set(ranks)
        for rank in wanted:
            self._send(rank, QUERY_TAG, None)
        positions: dict[int, Position] = {}
        end = time.monotonic() + patience_s
        while wanted - positions.keys() and time.monotonic() < end:
            status = MPI.Status()
            if self._comm.Iprobe(tag=POSITION_TAG, status=status):
                positions[status.source] = self._comm.recv(source=status.source, tag=POSITION_TAG)
            else:
                self.reply()
                time.sleep(POLL_INTERVAL_S)
        return positions

    def reply(self) -> None:
        """Tell each rank that has asked; call it often."""
        status = MPI.Status()
        while self._comm.Iprobe(tag=QUERY_TAG, status=status):
            self._comm.recv(source=status.source, tag=QUERY_TAG)
            self._send(status.source, POSITION_TAG, self._position())

    def _send(self, rank: int, tag: int, message: Position | None) -> None:
        self._sent.append(self._comm.isend(message, rank, tag))  # kept, for its buffer: who hears it may be gone
