"""The thread that aborts a rank on a signal, on the death of a peer, or when its main thread makes no progress.

The main thread cannot do so itself while it is blocked in an MPI call.
"""

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from moempi.errors import MoempiError
from moempi.runtime.hang import Position

STDERR = 2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# How long a rank waits for a lower surviving rank of its host to report a dead peer and abort.
SURVIVOR_GRACE_S = 2.0
NUM_WATCHED = 2
"""Each rank watches the next NUM_WATCHED ranks of its host, so that its cost does not grow with them."""
PERIOD_S = 0.5
GRACE_POLL_S = 0.02
LAST_RESORT_S = 60.0
# While the main thread passes no point, the positions of other ranks are asked for at least once in this share of the
# timeout.
SUSPICION_SHARE = 0.1


class HangError(MoempiError):
    """No rank made progress within `[run] timeout_s`, or a rank does not answer (EX_TEMPFAIL)."""

    exit_code = 75


class DeadRankError(MoempiError):
    """The process of a rank died without an error line (EX_TEMPFAIL)."""

    exit_code = 75


class InterruptedByError(MoempiError):
    """One of SIGNALS ended the program; the exit code is 128 + the signal's number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Watchdog:
    """Watches the main thread and the peers between `start` and `stop`, from a thread of its own.

    It calls `fail` with the error when a peer dies or a signal arrives that `accept` does not accept, `on_hang` with
    the timeout when the main thread passes no point for that long, and again while it passes none, at the latest after
    the seconds that it returns, and `reply` in every period. Python runs signal handlers on the main thread only, which
    may be blocked in MPI, so this thread reads the signal's number from the wake-up descriptor. `peers` are the process
    numbers of the other ranks on this host, by rank. `grace_s` delays the report of a signal, so that rank 0 reports
    first when the launcher signals every rank.

    Of the peers it watches the next NUM_WATCHED after `rank`, from the last to the first in a ring: whichever die, a
    survivor watches one of them.
    """

    def __init__(
        self,
        fail: Callable[[MoempiError], object],
        on_hang: Callable[[float], float],
        reply: Callable[[], object],
        *,
        rank: int,
        peers: Mapping[int, int],
        grace_s: float,
    ) -> None:
        self._fail = fail
        self._on_hang = on_hang
        self._reply = reply
        self._rank = rank
        self._peers = peers
        self._grace_s = grace_s
        self._accept: Callable[[int], bool] = lambda _number: False
        self._timeout_s: float | None = None
        self._group: int | None = None
        self._checked = self._ask_at = 0.0
        self._passed = 0
        self._last = (time.monotonic(), "the start")
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._inbox, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._handlers: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        self._alive: dict[int, int] = {}

    def start(self, accept: Callable[[int], bool] | None = None) -> None:
        """Replace the signal handlers and start the thread; main thread only.

        `accept(number)` returns whether a signal does not end the program; None accepts none.
        """
        self._accept = accept or self._accept
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._handlers[number] = signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for rank in watched(self._rank, self._peers):
            with suppress(OSError):  # not Linux, or dead already, which MPI reports
                self._alive[os.pidfd_open(self._peers[rank])] = rank
        self._thread.start()

    def ignore_signals(self) -> None:
        """Ignore the signals that end a program until the process ends; main thread only."""
        self._handlers.clear()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def stop(self) -> None:
        """Restore the signal handlers and end the thread; blocks until it has ended."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._wakeup.close()
        self._thread.join()
        self._inbox.close()
        for descriptor in self._alive:
            os.close(descriptor)
        faulthandler.cancel_dump_traceback_later()

    def limit(self, timeout_s: float | None, *, group: int | None) -> None:
        """From now on, `timeout_s` seconds without a call of `alive` are a hang, None for any number.

        See `Position` for `group`.
        """
        self.alive(self._last[1])
        self._group = group
        self._timeout_s = timeout_s

    def position(self) -> Position:
        """The main thread's position."""
        since, where = self._last
        return Position(self._group, self._passed, where, self._doing(), time.monotonic() - since)

    def alive(self, where: str) -> None:
        """Record that the main thread has passed the point `where`; costs less than a microsecond."""
        self._passed += 1
        self._last = (time.monotonic(), where)

    @property
    def where(self) -> str:
        """The last point that the main thread passed."""
        return self._last[1]

    def _watch(self) -> None:
        inbox = self._inbox.fileno()
        while True:
            ready = _ready([inbox, *self._alive], self._period_s())
            if inbox in ready:
                received = self._inbox.recv(16)
                if not received:
                    return
                self._on_signal(received)
            elif ready:
                self._on_peer_exit({self._alive[descriptor] for descriptor in ready})
            self._reply()
            if self._timeout_s is not None:
                self._check(self._timeout_s)
            else:
                faulthandler.cancel_dump_traceback_later()

    def _on_signal(self, received: bytes) -> None:
        ending = [number for number in received if not self._accept(number) and number in SIGNALS]
        if ending:
            end = time.monotonic() + self._grace_s
            while time.monotonic() < end:
                self._reply()  # rank 0 may ask who is left
                time.sleep(GRACE_POLL_S)
            self._fail(InterruptedByError(ending[0]))

    def _on_peer_exit(self, gone: set[int]) -> None:
        """Watched peers died. The lowest surviving rank of the host that watches a dead one reports it first."""
        dead = gone | {rank for rank, process in self._peers.items() if not _runs(process)}
        ranks, first = {self._rank, *self._peers}, min(dead)
        watching = (rank for rank in ranks - dead if not dead.isdisjoint(watched(rank, ranks)))
        if min(watching) != self._rank:
            time.sleep(SURVIVOR_GRACE_S)
        self._fail(DeadRankError(f"rank {first} is gone: its process {self._peers[first]} was killed or crashed"))

    def _period_s(self) -> float:
        return PERIOD_S if self._timeout_s is None else min(PERIOD_S, self._timeout_s / 4)

    def _check(self, timeout_s: float) -> None:
        # faulthandler's own C thread exits if a C call holds the interpreter's lock, which stops this thread as well.
        faulthandler.dump_traceback_later(timeout_s + LAST_RESORT_S, exit=True, file=STDERR)
        now, before = time.monotonic(), self._checked
        self._checked = now
        if now - before > PERIOD_S + timeout_s / 2:
            self.alive(self._last[1])  # the batch system suspended this process, and the others with it
        elif now - self._last[0] > timeout_s and now > self._ask_at:
            pause_s = min(self._on_hang(timeout_s), SUSPICION_SHARE * timeout_s)
            self._checked = time.monotonic()
            self._ask_at = self._checked + pause_s

    def _doing(self) -> str:
        """The innermost Python line of the main thread, as file:line."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return "an unknown line: the main thread has ended"
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def watched(rank: int, ranks: Collection[int]) -> list[int]:
    """The ranks that `rank` watches: the next NUM_WATCHED of these `ranks` in ascending order, and again from 0 on."""
    others = sorted(ranks, key=lambda other: (other <= rank, other))
    return [other for other in others if other != rank][:NUM_WATCHED]


def _runs(process: int) -> bool:
    """Whether the process exists and has not ended; a zombie has."""
    try:
        descriptor = os.pidfd_open(process)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    try:
        return not _ready([descriptor], 0.0)
    finally:
        os.close(descriptor)


def _ready(descriptors: Iterable[int], limit_s: float) -> list[int]:
    """The descriptors that can be read, or whose process has ended: blocks until there is one, or for `limit_s`.

    With `poll`, because `select` refuses descriptors above 1,023.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(1000 * limit_s)]
