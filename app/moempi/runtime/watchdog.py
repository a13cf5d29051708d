"""The thread that ends a rank whose main thread cannot: a signal, a dead neighbour, or no progress, in an MPI call."""

import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

from moempi.errors import MoempiError
from moempi.runtime.hang import Position

STDERR = 2
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# How long a rank that is not the first of those left waits for that one to speak and to end the program.
SECOND_S = 2.0
PERIOD_S = 0.5
LAST_RESORT_S = 60.0


class HangError(MoempiError):
    """A rank made no progress for as long as `[run] timeout_s` allows (EX_TEMPFAIL)."""

    exit_code = 75


class DeadRankError(MoempiError):
    """The process of a rank is gone, without a word (EX_TEMPFAIL)."""

    exit_code = 75


class InterruptedByError(MoempiError):
    """A person or the batch system asked the program to end; the exit code is the shell's, 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Watchdog:
    """Watches the main thread between `start` and `stop`, from a thread of its own.

    It calls `fail` once, `stalled` when the main thread stands still, and `answer` all the time.
    Python runs signal handlers on the main thread only, which may sit in a blocked MPI call: so the signal's number
    is read here, from the wake-up descriptor. `peers` gives the process of each other rank on this host. `grace_s`
    lets another rank speak first when all are struck at once.
    """

    def __init__(
        self,
        fail: Callable[[MoempiError], object],
        on_hang: Callable[[float], object],
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
        self._timeout_s: float | None = None
        self._group: int | None = None
        self._checked = 0.0
        self._passed = 0
        self._last = (time.monotonic(), "the start")
        self._main = threading.get_ident()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._inbox, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._handlers: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        self._alive: dict[int, int] = {}

    def start(self) -> None:
        """Take over the signals and begin to watch; main thread only."""
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for rank, process in self._peers.items():
            with suppress(OSError):  # not Linux, or gone already, of which MPI will tell
                self._alive[os.pidfd_open(process)] = rank
        self._thread.start()

    def stop(self) -> None:
        """Give the signals back and end the thread; blocks until it has ended."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._wakeup.close()
        self._thread.join()
        self._inbox.close()
        for descriptor in self._alive:
            os.close(descriptor)
        faulthandler.cancel_dump_traceback_later()

    def limit(self, timeout_s: float, *, group: int | None) -> None:
        """From now on, a stall is that `alive` is not called for `timeout_s` seconds. See `Position` for `group`."""
        self.alive(self._last[1])
        self._group = group
        self._timeout_s = timeout_s

    def position(self) -> Position:
        """Where the main thread stands."""
        since, where = self._last
        return Position(self._group, self._passed, where, self._doing(), time.monotonic() - since)

    def alive(self, where: str) -> None:
        """Note that the main thread has come to `where`; costs less than a microsecond."""
        self._passed += 1
        self._last = (time.monotonic(), where)

    @property
    def where(self) -> str:
        """Where the main thread was last."""
        return self._last[1]

    def _watch(self) -> None:
        while True:
            inbox = self._inbox.fileno()
            ready, _, _ = select.select([inbox, *self._alive], [], [], self._period_s())
            if inbox in ready:
                received = self._inbox.recv(16)
                if not received:
                    return
                self._on_signal(received)
            elif ready:
                self._on_peer_exit(ready)
            self._reply()
            if self._timeout_s is not None:
                self._check(self._timeout_s)

    def _on_signal(self, received: bytes) -> None:
        ending = [number for number in received if number in SIGNALS]
        if ending:
            time.sleep(self._grace_s)
            self._fail(InterruptedByError(ending[0]))

    def _on_peer_exit(self, gone: list[int]) -> None:
        """A neighbour died. The lowest rank of those left on the host says so."""
        dead = sorted(self._alive[descriptor] for descriptor in gone)
        left = [rank for rank in self._alive.values() if rank not in dead]
        if min([*left, self._rank]) != self._rank:
            time.sleep(SECOND_S)
        self._fail(DeadRankError(f"rank {dead[0]} is gone: its process {self._peers[dead[0]]} was killed or crashed"))

    def _period_s(self) -> float:
        return PERIOD_S if self._timeout_s is None else min(PERIOD_S, self._timeout_s / 4)

    def _check(self, timeout_s: float) -> None:
        # The last resort, needing no interpreter: a C call that keeps the interpreter's lock also stops this thread.
        faulthandler.dump_traceback_later(timeout_s + LAST_RESORT_S, exit=True, file=STDERR)
        now, before = time.monotonic(), self._checked
        self._checked = now
        if now - before > PERIOD_S + timeout_s / 2:
            self.alive(self._last[1])  # this process was suspended, as the batch system may do: so were the others
        elif now - self._last[0] > timeout_s:
            self._on_hang(timeout_s)
            self._checked = time.monotonic()

    def _doing(self) -> str:
        """The innermost Python line of the main thread."""
        frame = sys._current_frames().get(self._main)
        return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame is not None else "its last breath"
