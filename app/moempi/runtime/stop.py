"""Requests to end early: SIGUSR1, as batch systems send before the time is over, or the time given to the run."""

import signal
import time
from types import FrameType


class Stop:
    """Whether this process was asked to end at the next step border. All ranks end when one of them was asked.

    Make it on the main thread before MPI starts: from then on SIGUSR1 asks, and no longer kills. `max_minutes` counts
    from here.
    """

    def __init__(self, *, max_minutes: float | None = None) -> None:
        self._max_minutes = max_minutes
        self._deadline = None if max_minutes is None else time.monotonic() + 60.0 * max_minutes
        self._signalled = False
        signal.signal(signal.SIGUSR1, self._on_signal)

    @property
    def requested(self) -> bool:
        """Whether to end now; costs less than a microsecond."""
        return self._signalled or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def reason(self) -> str:
        """Why this process wants to end, or that another one does."""
        if self._signalled:
            return "SIGUSR1"
        return f"--max-minutes {self._max_minutes:g}" if self.requested else "another rank was asked to"

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signalled = True
