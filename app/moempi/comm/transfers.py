"""Transfers: communication that advances while lanes compute, and the seconds that the host waits for it.

The steps of a transfer are a generator. It starts requests, yields each request that it has to wait for, and returns
the transfer's value. `PendingTransfers.progress` advances every transfer of the rank whose request is complete. The
backend calls it between the pieces of long verbs, so rows are sent and received while any lane computes.
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
    """The steps of one request, whose value is `value`. `buffers` stay alive until the request is complete."""
    yield request
    return value


def after_verbs(backend: Backend, start: Callable[[], R]) -> Steps[R]:
    """The steps of a request that is started once all submitted verbs are done; the value is the request.

    The verbs write the buffer that is sent, or read the buffer that is received into. Buffers that `start` refers to
    stay alive until the request is complete.
    """
    event = backend.record_event()
    if event is not None:
        yield _EventRequest(event)
    request = start()
    yield request
    return request


class PendingTransfers:
    """The unfinished transfers of all lanes of a rank."""

    def __init__(self) -> None:
        self._transfers: list[Transfer[Any]] = []

    def add(self, transfer: "Transfer[Any]") -> None:
        """Advance `transfer` in each `progress` from now on."""
        self._transfers.append(transfer)

    def progress(self) -> None:
        """Advance every transfer whose request is complete; does not block."""
        self._transfers = [transfer for transfer in self._transfers if not transfer.finished]
        for transfer in self._transfers:
            transfer.Test()


class Transfers:
    """Starts the transfers of one lane, and records what they cost.

    Without `overlap`, `start` finishes each transfer before it returns; nothing else changes. `waits` are the seconds
    that the host was blocked, by cause: "exchange" for rows of the layer, "pipeline" for another stage, "idle" for a
    slower rank of this stage. `counters` are bytes and messages by level of link. `count_mismatch` is the number of
    rows that this rank planned to send, less the number that it planned to receive; its sum over all ranks is 0.
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
        """Start a transfer; the time that the host is blocked by it is added to `waits[waiting]`.

        Blocks only without `overlap`.
        """
        transfer = self._start(steps, waiting)
        if not self._overlap:
            transfer.finish()
        return transfer

    def start_between_stages(self, steps: Steps[T]) -> "Transfer[T]":
        """Start a transfer to or from another stage, whose ranks are at other points; never blocks."""
        return self._start(steps, "pipeline")

    def count_rows(self, *, sent: int, received: int) -> None:
        """Add the rows of one plan to `count_mismatch`."""
        self.count_mismatch += sent - received

    def wait(self, request: MpiRequest, *, waiting: str) -> None:
        """Block until the request is complete; the time is added to `waits[waiting]`.

        If verbs return before they are done, transfers of all lanes advance meanwhile, because their events can occur.
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
        """Add seconds that the host was blocked to `waits[waiting]`."""
        self.waits[waiting] += seconds

    def progress(self) -> None:
        """Advance the transfers of all lanes; does not block."""
        self._pending.progress()

    def _start(self, steps: Steps[T], waiting: str) -> "Transfer[T]":
        transfer = Transfer(steps, self, self._backend, waiting=waiting)
        self._pending.add(transfer)
        return transfer


class Transfer(Generic[T]):
    """One transfer. Its steps run on the backend queue on which it was started, whichever lane advances it.

    A transfer is itself a request, for which the steps of another transfer can wait.
    """

    def __init__(self, steps: Steps[T], transfers: Transfers, backend: Backend, *, waiting: str) -> None:
        self.finished = False
        self._failure: BaseException | None = None
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
        """Block until the transfer is finished, and return its value; raises the error of a step that failed."""
        while not self.Test():
            self._transfers.wait(self._request, waiting=self._waiting)
        if self._failure is not None:
            raise self._failure
        return self._value

    def _advance(self) -> None:
        """Run the steps to their next request. A verb among them may call `progress`, which skips this transfer."""
        self._is_advancing = True
        try:
            if self._backend.queue == self._queue:
                self._request = next(self._steps)
            else:
                with self._backend.on_queue(self._queue):
                    self._request = next(self._steps)
        except StopIteration as end:
            self.finished = True
            self._value: T = end.value
        except BaseException as error:
            self.finished = True
            self._failure = error
            raise
        finally:
            self._is_advancing = False
