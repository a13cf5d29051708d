"""Abort messages between ranks: "the error line is printed", and the positions of ranks for a hang report.

The watchdog's thread sends them over a communicator of their own, because the main thread may be blocked in MPI.
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
    """A rank's abort messages: announcements to rank 0 and to its `peers`, queries to any rank.

    `peers` are the other ranks of its host; `position` returns this rank's position. Making a channel is collective.
    Its methods are safe from any thread.
    """

    def __init__(self, comm: MPI.Intracomm, peers: Iterable[int], position: Callable[[], Position]) -> None:
        self._comm = comm.Dup()
        self._position = position
        self._sent: list[MPI.Request] = []
        self._receivers = [rank for rank in dict.fromkeys([0, *peers]) if rank != comm.rank]

    def announce(self) -> None:
        """Send to rank 0 and the peers that this rank has printed the error line, so that they print none."""
        for rank in self._receivers:
            self._send(rank, ANNOUNCE_TAG, None)

    def announced(self) -> bool:
        """Whether another rank has announced its error line; blocks for up to NUM_POLLS * POLL_INTERVAL_S."""
        for _ in range(NUM_POLLS):
            if self._comm.Iprobe(tag=ANNOUNCE_TAG):
                return True
            time.sleep(POLL_INTERVAL_S)  # a message arrives only inside MPI calls: probe again
        return False

    def query_positions(self, ranks: Iterable[int], *, patience_s: float) -> dict[int, Position]:
        """The positions of those `ranks` that reply within `patience_s`; blocks until all have or the time is over.

        Replies to the queries of other ranks meanwhile.
        """
        queried = set(ranks)
        for rank in queried:
            self._send(rank, QUERY_TAG, None)
        positions: dict[int, Position] = {}
        end = time.monotonic() + patience_s
        while queried - positions.keys() and time.monotonic() < end:
            status = MPI.Status()
            if self._comm.Iprobe(tag=POSITION_TAG, status=status):
                positions[status.source] = self._comm.recv(source=status.source, tag=POSITION_TAG)
            else:
                self.reply()
                time.sleep(POLL_INTERVAL_S)
        return positions

    def reply(self) -> None:
        """Send this rank's position to every rank whose query has arrived; the watchdog calls it in every period."""
        status = MPI.Status()
        while self._comm.Iprobe(tag=QUERY_TAG, status=status):
            self._comm.recv(source=status.source, tag=QUERY_TAG)
            self._send(status.source, POSITION_TAG, self._position())

    def _send(self, rank: int, tag: int, message: Position | None) -> None:
        # The requests are kept, because MPI reads their buffers, and never waited for: the receiver may be dead.
        self._sent.append(self._comm.isend(message, rank, tag))
