"""The thread that ends a rank whose main thread cannot: a signal that arrives, or no progress, inside an MPI call."""

import faulthandler
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

from moempi.errors import MoempiError

STDERR = 2
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StalledError(MoempiError):
    """A rank made no progress for as long as `[run] timeout_s` allows (EX_TEMPFAIL)."""

    exit_code = 75


class InterruptedByError(MoempiError):
    """A person or the batch system asked the program to end; the exit code is the shell's, 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Watchdog:
    """Watches the main thread between `start` and `stop` and calls `fail` from its own thread, at most once.

    Python runs signal handlers on the main thread only, which may sit in a blocked MPI call: so the signal's number
    is read here, from the wake-up descriptor. `grace_s` lets another rank speak first when all are struck at once.
    """

    def __init__(self, fail: Callable[[MoempiError], object], *, grace_s: float) -> None:
        self._fail = fail
        self._grace_s = grace_s
        self._timeout_s: float | None = None
        self._last = (time.monotonic(), "the start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._inbox, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._handlers: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def start(self) -> None:
        """Take over the signals and begin to watch; main thread only."""
        for number in SIGNALS:
            self._handlers[number] = signal.signal(number, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def stop(self) -> None:
        """Give the signals back and end the thread; blocks until it has ended."""
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._wakeup.close()
        self._thread.join()
        self._inbox.close()
        faulthandler.cancel_dump_traceback_later()

    def limit(self, timeout_s: float) -> None:
        """From now on, fail when `alive` is not called for `timeout_s` seconds."""
        self.alive(self._last[1])
        self._timeout_s = timeout_s

    def alive(self, where: str) -> None:
        """Note that the main thread has come to `where`; costs less than a microsecond."""
        self._last = (time.monotonic(), where)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._inbox], [], [], self._period_s())
            if ready:
                received = self._inbox.recv(16)
                if not received:
                    return
                time.sleep(self._grace_s)
                self._fail(InterruptedByError(received[0]))
            elif self._timeout_s is not None:
                self._check(self._timeout_s)

    def _period_s(self) -> float:
        return 1.0 if self._timeout_s is None else min(1.0, self._timeout_s / 4)

    def _check(self, timeout_s: float) -> None:
        # The last resort, needing no interpreter: a C call that keeps the interpreter's lock also stops this thread.
        faulthandler.dump_traceback_later(timeout_s + 5, exit=True, file=STDERR)
        since, where = self._last
        if time.monotonic() - since > timeout_s + self._grace_s:
            self._fail(StalledError(f"no progress for {timeout_s:g} s, last at {where}; see run.timeout_s"))
