"""Transfers: communication that advances by itself, and how long the host waited for it.

The steps of a transfer are a generator. It starts requests, yields each one that it has to wait for, and returns the
transfer's value. `PendingTransfers.progress` advances every transfer of the rank whose request is complete; the backend
calls it between the pieces of long verbs, so rows leave and arrive while any lane computes.
"""

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Generic, TypeVar

from moempi.backend.protocol import Backend, Event
from moempi.comm.transports.base import MpiRequest
from moempi.comm.transports.counted import Counters, no_counts

T = TypeVar("T")
R = TypeVar("R", bound=MpiRequest)
Steps = Generator[MpiRequest, None, T]
WAITS = ("exchange", "pipeline", "idle")


@dataclass(frozen=True, slots=True)
class _EventRequest:
    """An event of the backend as a request."""

    event: Event

    def Test(self) -> bool:  # noqa: N802
        return self.event.is_done()

    def Wait(self) -> None:  # noqa: N802
        self.event.synchronize()


def complete(request: MpiRequest, value: T, *buffers: object) -> Steps[T]:
    """Wait for one request; returns `value`. `buffers` stay alive until the request is complete."""
    yield request
    return value


def after_verbs(backend: Backend, start: Callable[[], R]) -> Steps[R]:
    """Start a request once the verbs submitted before are done, wait for it, and return it.

    The verbs fill the buffer that is sent, or read the one that is received into.
    """
    event = backend.record_event()
    if event is not None:
        yield _EventRequest(event)
    request = start()
    yield request
    return request


class PendingTransfers:
    """The transfers of a rank, of all its lanes, that are not finished."""

    def __init__(self) -> None:
        self._transfers: list[Transfer[Any]] = []

    def add(self, transfer: "Transfer[Any]") -> None:
        """Advance this transfer too from now on."""
        self._transfers.append(transfer)

    def progress(self) -> None:
        """Advance every transfer whose request is complete; does not block."""
        self._transfers = [transfer for transfer in self._transfers if not transfer.finished]
        for transfer in self._transfers:
            transfer.Test()


class Transfers:
    """The transfers of one lane: seconds that the host waited for them, and what was sent.

    With `overlap` off, each transfer is finished before `start` returns; nothing else changes. `waits` are seconds by
    cause: "exchange" is rows of this layer, "pipeline" another stage, "idle" a slower rank of this stage. `counters`
    are bytes and messages by level of link. `count_mismatch` is the rows that this rank planned to send less those
    that it planned to receive; the sum over all ranks is 0.
    """

    def __init__(self, backend: Backend, pending: PendingTransfers, *, overlap: bool) -> None:
        self.waits = dict.fromkeys(WAITS, 0.0)
        self.counters: Counters = no_counts()
        self.count_mismatch = 0
        self._backend = backend
        self._pending = pending
        self._overlap = overlap
        self._starts_late = backend.record_event() is not None

    def start(self, steps: Steps[T], *, waiting: str) -> "Transfer[T]":
        """Start a transfer; time that the host is blocked by it counts as `waits[waiting]`."""
        transfer = self.start_receive(steps, waiting=waiting)
        if not self._overlap:
            transfer.finish()
        return transfer

    def start_receive(self, steps: Steps[T], *, waiting: str) -> "Transfer[T]":
        """The same for what another stage sends in its own time: never blocks."""
        transfer = Transfer(steps, self, self._backend, waiting=waiting)
        self._pending.add(transfer)
        return transfer

    def count_rows(self, *, sent: int, received: int) -> None:
        """Add the rows of one plan to `count_mismatch`."""
        self.count_mismatch += sent - received

    def wait(self, request: MpiRequest, *, waiting: str) -> None:
        """Block until the request is complete.

        With a backend whose verbs return before they are done, other transfers start meanwhile, as their events occur.
        """
        begin = perf_counter()
        if self._starts_late:
            while not request.Test():
                self.progress()
                os.sched_yield()
        else:
            request.Wait()
        self.add_wait(waiting, perf_counter() - begin)

    def add_wait(self, waiting: str, seconds: float) -> None:
        """Count seconds that the host was blocked."""
        self.waits[waiting] += seconds

    def progress(self) -> None:
        """Advance the transfers of all lanes; does not block."""
        self._pending.progress()


class Transfer(Generic[T]):
    """One transfer. Its steps run on the backend queue on which it was started, whichever lane computes meanwhile.

    A transfer is a request itself: the steps of another one may wait for it.
    """

    def __init__(self, steps: Steps[T], transfers: Transfers, backend: Backend, *, waiting: str) -> None:
        self.finished = False
        self._steps = steps
        self._transfers = transfers
        self._backend = backend
        self._queue = backend.queue
        self._waiting = waiting
        self._is_advancing = False
        self._advance()

    def Test(self) -> bool:  # noqa: N802
        """Run the steps whose requests are complete; whether the transfer is finished. Does not block."""
        while not (self.finished or self._is_advancing) and self._request.Test():
            self._advance()
        return self.finished

    def Wait(self) -> None:  # noqa: N802
        """Block until the transfer is finished."""
        self.finish()

    def finish(self) -> T:
        """Block until the transfer is finished; its value."""
        while not self.Test():
            self._transfers.wait(self._request, waiting=self._waiting)
        return self._value

    def _advance(self) -> None:
        """Run the steps to their next request. A verb among them may call `progress`, which skips this transfer."""
        self._is_advancing = True
        try:
            with self._backend.on_queue(self._queue):
                self._request = next(self._steps)
        except StopIteration as end:
            self.finished = True
            self._value: T = end.value
        finally:
            self._is_advancing = False
