"""Messages between ranks about the run: "the error line is printed", positions for a hang report, loads, and stops.

The watchdog's thread sends them, because the main thread may be blocked in MPI.
"""

import threading
import time
from collections.abc import Callable, Iterable

from mpi4py import MPI

from moempi.runtime.hang import Position
from moempi.runtime.slow_hosts import Load

ANNOUNCE_TAG, QUERY_TAG, POSITION_TAG, LOAD_TAG, STOP_TAG = range(32_000, 32_005)
"""Tags beyond those of messages between stages, and within MPI's limit of 32,767."""
NUM_POLLS = 10
POLL_INTERVAL_S = 0.005


class AbortChannel:
    """A rank's abort messages: announcements to rank 0 and to its `peers`, queries to any rank.

    `peers` are the other ranks of its host; `position` returns this rank's position. No other message over `comm` has
    its tags. Its methods are safe from any thread.
    """

    def __init__(self, comm: MPI.Intracomm, peers: Iterable[int], position: Callable[[], Position]) -> None:
        self._comm = comm
        self._position = position
        self._sent: list[MPI.Request] = []
        self._stop = threading.Lock()  # held from the first stop on
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
            if (message := self._comm.improbe(tag=POSITION_TAG, status=status)) is not None:
                positions[status.source] = message.recv()
            else:
                self.reply()
                time.sleep(POLL_INTERVAL_S)
        return positions

    def reply(self) -> None:
        """Send this rank's position to every rank whose query has arrived; the watchdog calls it in every period."""
        status = MPI.Status()
        # A matched probe, because two threads may look at the same time: a signal's and the main thread's error.
        while (message := self._comm.improbe(tag=QUERY_TAG, status=status)) is not None:
            message.recv()
            self._send(status.source, POSITION_TAG, self._position())

    def send_load(self, load: Load) -> None:
        """Send this rank's load to rank 0, which may be this rank."""
        for request in [request for request in tuple(self._sent) if request.Test()]:
            self._sent.remove(request)  # in place: another thread may append one meanwhile
        self._send(0, LOAD_TAG, load)

    def received_loads(self) -> dict[int, Load]:
        """The last load of each rank from which one has arrived since the last call; for rank 0."""
        loads: dict[int, Load] = {}
        status = MPI.Status()
        while (message := self._comm.improbe(tag=LOAD_TAG, status=status)) is not None:
            loads[status.source] = message.recv()
        return loads

    @property
    def stop_requested(self) -> bool:
        """Whether any rank has called `request_stop`, as far as this rank knows."""
        return self._stop.locked()

    def request_stop(self) -> None:
        """Send to all ranks that the run is to stop; other ranks may do so at the same time.

        The messages follow the edges of one binary tree, whose root is rank 0, an edge in each period of the watchdogs:
        every rank knows it after at most 2 log2(ranks) periods. A rank sends at most three messages.
        """
        self._send_stop(self._comm.rank)

    def forward_stop(self) -> None:
        """Forward the messages of `request_stop` that have arrived; the watchdog calls it in every period."""
        status = MPI.Status()
        while (message := self._comm.improbe(tag=STOP_TAG, status=status)) is not None:
            message.recv()
            self._send_stop(status.source)

    def _send_stop(self, source: int) -> None:
        """Send to the parent and the children of this rank, except `source`, if this is the first stop."""
        if not self._stop.acquire(blocking=False):
            return
        rank = self._comm.rank
        for neighbour in ((rank - 1) // 2, 2 * rank + 1, 2 * rank + 2):  # rank 0 has no parent: -1
            if 0 <= neighbour < self._comm.size and neighbour != source:
                self._send(neighbour, STOP_TAG, None)

    def _send(self, rank: int, tag: int, message: Position | Load | None) -> None:
        # The requests are kept, because MPI reads their buffers, and never waited for: the receiver may be dead.
        self._sent.append(self._comm.isend(message, rank, tag))
