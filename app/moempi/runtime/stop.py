"""Requests to end the run early: SIGUSR1, which batch systems send before a job's time is over, or `--max-minutes`."""

import signal
import time
from types import FrameType


class Stop:
    """Whether this process is requested to end after the current step. A request on one rank ends all ranks.

    Make it on the main thread before MPI starts: from then on SIGUSR1 is a request and does not kill the process.
    `max_minutes` counts from its construction.
    """

    def __init__(self, *, max_minutes: float | None = None) -> None:
        self._max_minutes = max_minutes
        self._deadline = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._signalled = False
        signal.signal(signal.SIGUSR1, self._on_signal)

    @property
    def requested(self) -> bool:
        """Whether this process is requested to end; costs less than a microsecond."""
        return self._signalled or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def reason(self) -> str:
        """What the request was; a fixed text if only another rank has one."""
        if self._signalled:
            return "SIGUSR1"
        return f"--max-minutes {self._max_minutes:g}" if self.requested else "another rank was asked to"

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True
