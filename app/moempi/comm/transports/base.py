"""A transfer under way, and what every transport offers."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol, cast

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend, Event


class MpiRequest(Protocol):
    """What of MPI's requests a transfer needs."""

    def Test(self) -> bool:  # noqa: N802
        """Make progress; whether it is complete."""

    def Wait(self) -> Any:  # noqa: N802
        """Block until complete."""


class Receipt(MpiRequest, Protocol):
    """What a transport starts: a request, and where its rows are once it is complete."""

    def rows(self) -> tuple[Any, IntArray | None]:
        """An array, and where in it the received rows lie, in order of source; None: from its first row on."""

    def release(self) -> None:
        """The received rows have been read; where they lie may be written again."""


@dataclass(frozen=True, slots=True)
class BufferReceipt:
    """A transfer into the receiver's own buffer."""

    request: MpiRequest
    incoming: Any

    def Test(self) -> bool:  # noqa: N802
        return self.request.Test()

    def Wait(self) -> None:  # noqa: N802
        self.request.Wait()

    def rows(self) -> tuple[Any, IntArray | None]:
        return self.incoming, None

    def release(self) -> None:
        """See `Landing.release`; the buffer is the receiver's."""


@dataclass(slots=True)
class StartAfter:
    """A transfer that starts at the first look after a mark of the backend's queue is reached."""

    backend: Backend
    event: Event
    start: Callable[[], MpiRequest]
    queue: int
    request: MpiRequest | None = None

    def Test(self) -> bool:  # noqa: N802
        if self.request is None:
            if not self.event.is_done():
                return False
            current = self.backend.queue
            self.backend.use_queue(self.queue)
            self.request = self.start()
            self.backend.use_queue(current)
        return self.request.Test()

    def Wait(self) -> None:  # noqa: N802
        wait_for(self, self.backend)

    def started(self) -> MpiRequest:
        """The request, once it is complete."""
        if self.request is None:
            raise RuntimeError("a transfer has not started yet")
        return self.request


def wait_for(request: MpiRequest, backend: Backend) -> None:
    """Block until complete, and let transfers of all lanes start as their marks are reached."""
    while not request.Test():
        backend.progress()
        os.sched_yield()


def start_after_verbs(backend: Backend, start: Callable[[], MpiRequest]) -> MpiRequest:
    """Start a transfer once the verbs that fill its buffer, or still read it, are done: at once where they are."""
    mark = backend.record_event()
    return start() if mark is None else StartAfter(backend, mark, start, backend.queue)


Waits = dict[str, float]
"""Seconds that the host was blocked, by what it waited for.

"exchange" is rows of this layer, "pipeline" the stage before or the last one, "idle" a slower rank of this stage.
"""


@dataclass(slots=True)
class Transfer:
    """Rows on the network. It keeps its buffers alive until `finish`, which adds its wait to `waits[waiting]`.

    With `backend`, one whose verbs return early, waiting keeps the transfers of all lanes moving. `then` is called
    once, when the transfer is seen to be complete: while another lane computes, or at last by `finish`.
    """

    request: MpiRequest
    outgoing: Any
    incoming: Any
    waits: Waits
    waiting: str
    backend: Backend | None = None
    then: Callable[[], None] | None = None
    finished: bool = field(default=False)

    def progress(self) -> None:
        """Let MPI move data; does not block."""
        if not self.finished and self.request.Test():
            self._end()

    def finish(self) -> Any:
        """Block until the rows are here; the buffer that holds them."""
        if not self.finished:
            begin = perf_counter()
            if self.backend is None:
                self.request.Wait()
            else:
                wait_for(self.request, self.backend)
            self.waits[self.waiting] += perf_counter() - begin
            self._end()
        self.outgoing = None
        return self.incoming

    def _end(self) -> None:
        """Once: waiting for a transfer may progress all, and it among them."""
        if not self.finished:
            self.finished = True
            then, self.then = self.then, None  # with what it holds
            if then is not None:
                then()

    def receipt(self) -> Receipt:
        """Block until the rows are here; where they are. For what a transport started."""
        self.finish()
        landing = self.request.started() if isinstance(self.request, StartAfter) else self.request
        return cast(Receipt, landing)


class Transport(Protocol):
    """A way for rows of a fixed number of bytes to travel.

    Starting a transfer is collective over the group, in the same order on all ranks. Two may be under way at a time.
    """

    name: str

    def outgoing(self, rows: int) -> Any:
        """A buffer (rows, row bytes) of uint8 for the rows of the next `start`, where this transport reads them best.

        It is used again two transfers later; until the ranks have taken what it held, this blocks.
        """

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> Receipt:
        """Send rows of `outgoing`, ordered by destination, and receive into `incoming`, ordered by source.

        `outgoing` is what the last call of that name returned. Counts are in rows, one a rank. Does not block; both
        buffers stay untouched until the request is complete. The rows need not arrive in `incoming`: see `Landing`.
        """
