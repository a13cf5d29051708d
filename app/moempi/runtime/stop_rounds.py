"""A request to stop reaches all ranks while each does work of its own, such as reading its weights."""

from collections import deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from mpi4py import MPI

from moempi.errors import MoempiError

T = TypeVar("T")


class StoppedError(Exception):
    """The work of this rank ends early, because a rank is requested to stop."""


class StopRounds:
    """Rounds in which the ranks of `comm` combine their `requested`, without waiting for each other until the end.

    A rank takes part in a round when it comes to `next_round`, so a rank learns of the requests of others as soon as
    all have come equally far. Each takes part in `rounds` rounds and a last one. `comm` is in use meanwhile.
    """

    def __init__(self, comm: MPI.Intracomm, requested: Callable[[], bool], *, rounds: int) -> None:
        self._comm = comm
        self._requested = requested
        self._left = rounds + 1
        self._pending: deque[tuple[MPI.Request, np.ndarray]] = deque()
        self._agreed = False

    def run(self, work: Callable[[], T]) -> T | None:
        """The value of `work()`; None on all ranks if any is requested to stop before its work is done.

        Collective, blocks. Raises the MoempiError of this rank's work.
        """
        try:
            value = work()
        except StoppedError:
            value = None
        except MoempiError:
            self._finish()
            raise
        self._finish()
        return None if self._agreed else value

    def next_round(self) -> None:
        """Take part in the next round; does not block."""
        if self._left > 1:
            self._begin_round()

    def check(self) -> None:
        """Raise StoppedError if this rank is requested to stop, or knows of one that is; costs some microseconds."""
        while self._pending and self._pending[0][0].Test():
            self._agreed |= bool(self._pending.popleft()[1][0])
        if self._agreed or self._requested():
            raise StoppedError

    def _begin_round(self) -> None:
        own, found = np.array([self._requested()], np.int8), np.zeros(1, np.int8)
        self._pending.append((self._comm.Iallreduce(own, found, MPI.MAX), found))
        self._left -= 1

    def _finish(self) -> None:
        while self._left:
            self._begin_round()
        while self._pending:
            request, found = self._pending.popleft()
            request.Wait()
            self._agreed |= bool(found[0])
