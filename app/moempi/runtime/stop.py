"""Requests to end the run early: SIGUSR1, which batch systems send before its time is over; Ctrl-C; a deadline."""

import os
import signal
import sys
import threading
import time
from types import FrameType

from moempi.printing import write_error
from moempi.runtime.launcher import launched_first

PASSED_ON = signal.SIGUSR2
"""What `moempi launch` sends for a Ctrl-C: a launcher of ranks ends them on SIGINT, and passes this signal on."""
REQUESTS = {signal.SIGUSR1: "SIGUSR1", signal.SIGINT: "SIGINT", PASSED_ON: "SIGINT"}
"""The signals that are requests, with what was done by whoever made them."""


class StoppedError(Exception):
    """The work of this rank ends early, because it is requested to stop."""


class Stop:
    """Whether this process is requested to end after the current step. A request on one rank ends all ranks.

    `max_minutes` counts from its construction. Until `catch_signals`, signals are no requests.
    """

    def __init__(self, *, max_minutes: float | None = None) -> None:
        self._max_minutes = max_minutes
        self._deadline = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._signal = ""
        self._interrupted = False
        self._has_steps = True
        self._announcement_due = threading.Lock()  # taken once, by whichever thread is first

    def catch_signals(self) -> None:
        """From now on the signals that `accept` accepts are requests and do not kill the process.

        Call it on the main thread before MPI starts.
        """
        for number in REQUESTS:
            signal.signal(number, self._on_signal)

    def accept(self, number: int) -> bool:
        """Whether a signal is a request: one of REQUESTS, of SIGINT the first. Rank 0 prints a line at the first one.

        Safe from any thread.
        """
        again = number == signal.SIGINT and self._interrupted
        if number not in REQUESTS or again:
            return False
        self._interrupted |= number == signal.SIGINT
        self._signal = self._signal or REQUESTS[signal.Signals(number)]
        if launched_first(os.environ) and self._announcement_due.acquire(blocking=False):
            self._announce()
        return True

    def end_of_steps(self) -> None:
        """All steps are done: from now on a request changes nothing, because only the results are left to write."""
        self._has_steps = False

    @property
    def requested(self) -> bool:
        """Whether this process is requested to end; costs less than a microsecond."""
        return bool(self._signal) or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def reason(self) -> str:
        """What the request was; a fixed text if only another rank has one."""
        if self._signal:
            return self._signal
        return f"--max-minutes {self._max_minutes:g}" if self.requested else "another rank was asked to"

    def _announce(self) -> None:
        text = "stopping at the next step; the same command continues" if self._has_steps else "writing the results"
        if _is_watched():
            write_error(f"{text} (Ctrl-C again ends at once)", on_new_line=True)  # after a progress bar and ^C
        else:
            write_error(text)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if not self.accept(number):
            raise KeyboardInterrupt


def _is_watched() -> bool:
    """Whether a person watches stderr, which is a pipe under mpirun: see jobs/env.sh."""
    return os.environ.get("TTY_INTERACTIVE") == "1" or (sys.stderr is not None and sys.stderr.isatty())
