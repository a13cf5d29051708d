"""Transfers: communication that advances while lanes compute, and the seconds that the host waits for it.

The steps of a transfer are a generator. It starts requests, yields each request that it has to wait for, and returns
the transfer's value. `PendingTransfers.progress` advances every transfer of the rank whose request is complete. The
backend calls it between the pieces of long verbs, and so does every wait of the host: rows are sent, forwarded and
received while any lane computes or waits.
"""

import os
from collections.abc import Callable, Generator, Mapping
from time import perf_counter, sleep
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.comm.transports.base import Completion
from moempi.comm.transports.counted import TO_EXPERTS, Counters, no_counts
from moempi.layout.schedule import Point
from moempi.layout.topology import LEVELS, SELF
from moempi.runtime.waiting import SPIN_S, num_preemptions

T = TypeVar("T")
R = TypeVar("R", bound=Completion)
Steps = Generator[Completion, None, T]
EXCHANGE, PIPELINE, IDLE = WAITS = ("exchange", "pipeline", "idle")
NAP_S = 5e-3
"""Longest sleep between two looks at a transfer from another stage, or on a core that another process uses."""
EVENT_NAP_S = 50e-6
"""Longest sleep if verbs return before they are done: events that occur meanwhile start transfers of other lanes."""


class Condition(NamedTuple):
    """A request that is complete once `Test()` is true; it does not block."""

    Test: Callable[[], bool]


NO_LEVELS = np.zeros(0, np.int64)
NO_REQUEST = Condition(lambda: True)


def complete(request: Completion, value: T, *buffers: object) -> Steps[T]:
    """The steps of one request, whose value is `value`. `buffers` stay alive until the request is complete."""
    yield request
    return value


def nothing() -> Steps[Any]:
    """No steps: the transfer is finished when it starts, and has no value."""
    yield from ()


def after_verbs(backend: Backend, start: Callable[[], R]) -> Steps[R]:
    """The steps of a request that is started once all submitted verbs are done; the value is the request.

    The verbs write the buffer that is sent, or read the buffer that is received into. Buffers that `start` refers to
    stay alive until the request is complete.
    """
    event = backend.record_event()
    if event is not None:
        yield Condition(event.is_done)
    request = start()
    yield request
    return request


def downloaded(backend: Backend, *arrays: Array) -> Steps[list[npt.NDArray[Any]]]:
    """The steps of a copy of the backend's arrays to the host; the value is the copies."""
    download = backend.start_download(*arrays)
    if download.event is not None:
        yield Condition(download.event.is_done)
    return download.values()


class PendingTransfers:
    """The unfinished transfers of all lanes of a rank."""

    def __init__(self) -> None:
        self._transfers: list[Transfer[Any]] = []

    def add(self, transfer: "Transfer[Any]") -> None:
        """Advance `transfer` in each `progress` from now on."""
        self._transfers.append(transfer)

    def remove(self, transfer: "Transfer[Any]") -> None:
        """Forget a transfer that is finished."""
        self._transfers.remove(transfer)

    def progress(self) -> None:
        """Advance every transfer whose request is complete; does not block."""
        for transfer in tuple(self._transfers):
            transfer.Test()

    def wait_for_any(self, transfers: Mapping[int, "Transfer[Any]"]) -> int:
        """Block until one of these transfers is finished, and return its key. All transfers advance meanwhile.

        The time is added to the waits of that transfer, by its cause when the host began to wait.
        """
        begin = perf_counter()
        causes = {key: transfer.waiting for key, transfer in transfers.items()}
        longest_nap_s = min(transfer.longest_nap_s for transfer in transfers.values())
        can_nap, preemptions = all(transfer.is_from_a_stage for transfer in transfers.values()), num_preemptions()
        while True:
            for key, transfer in transfers.items():
                if transfer.Test():
                    transfer.add_wait(causes[key], perf_counter() - begin)
                    return key
            self.progress()
            os.sched_yield()
            before, preemptions = preemptions, num_preemptions()
            if (can_nap or preemptions > before) and (waited_s := perf_counter() - begin) > SPIN_S:
                sleep(min(waited_s / 8, longest_nap_s))  # other ranks on this core can run


class Transfers:
    """Starts the transfers of one lane, and records what they cost.

    `waits` are the seconds that the host was blocked, by cause: "exchange" for rows of the layer, "pipeline" for
    another stage, "idle" for a slower rank of this stage. `counters` are bytes and messages by level of link;
    `levels` (R,) are the levels of this rank's links to all ranks of the run. `count_mismatch` is the number of rows
    that this rank planned to send, less the number that it planned to receive; its sum over all ranks is 0.
    `finished` is a transfer of nothing.
    """

    def __init__(self, backend: Backend, pending: PendingTransfers, *, levels: IntArray = NO_LEVELS) -> None:
        self.backend = backend
        self.pending = pending
        self._levels = levels
        self.waits = dict.fromkeys(WAITS, 0.0)
        self.counters: Counters = no_counts()
        self.count_mismatch = 0
        self.longest_nap_s = NAP_S if backend.record_event() is None else EVENT_NAP_S
        self.finished: Transfer[None] = Transfer(nothing(), self, waiting=EXCHANGE)

    def start(self, steps: Steps[T], *, waiting: str = EXCHANGE) -> "Transfer[T]":
        """Start a transfer; the time that the host is blocked by it is added to `waits[waiting]`. Does not block."""
        transfer = Transfer(steps, self, waiting=waiting)
        if not transfer.finished:
            self.pending.add(transfer)
        return transfer

    def count_sent(self, kind: str, rank: int, num_bytes: int) -> None:
        """Count a message of rows to a rank of the run; nothing if it is empty, or if `levels` are unknown."""
        if num_bytes and len(self._levels):
            level = LEVELS[self._levels[rank]]
            self.counters[f"{kind}{level}_bytes"] += num_bytes
            self.counters[f"{kind}{level}_messages"] += 1

    def count_kept(self, num_bytes: int, *, messages: int) -> None:
        """Count equal messages of rows of this rank to its own experts, or back; nothing if they are empty."""
        if num_bytes:
            self.counters[f"{TO_EXPERTS}{LEVELS[SELF]}_bytes"] += messages * num_bytes
            self.counters[f"{TO_EXPERTS}{LEVELS[SELF]}_messages"] += messages

    def count_rows(self, *, sent: int, received: int) -> None:
        """Add the rows of one plan to `count_mismatch`."""
        self.count_mismatch += sent - received


class Transfer(Generic[T]):
    """One transfer. Its steps run on the backend queue on which it was started, whichever lane advances it.

    A transfer is itself a request, for which the steps of another transfer can wait.
    """

    def __init__(self, steps: Steps[T], transfers: Transfers, *, waiting: str) -> None:
        self.finished = False
        self._failure: BaseException | None = None
        self._request: Completion = NO_REQUEST
        self._steps = steps
        self._transfers = transfers
        self._backend = transfers.backend
        self._queue = self._backend.queue
        self._waiting = waiting
        self._is_advancing = False
        self._advance()

    @property
    def waiting(self) -> str:
        """The cause of a wait for this transfer; if it waits for another transfer, the cause of that one."""
        return self._request.waiting if isinstance(self._request, Transfer) else self._waiting

    @property
    def is_from_a_stage(self) -> bool:
        """Whether it waits for another stage, which may take long: the process may sleep meanwhile."""
        return self._waiting == PIPELINE

    @property
    def longest_nap_s(self) -> float:
        """The longest sleep of the host while it waits."""
        return self._transfers.longest_nap_s

    def add_wait(self, cause: str, seconds: float) -> None:
        """Add seconds that the host was blocked by this transfer."""
        self._transfers.waits[cause] += seconds

    def Test(self) -> bool:  # noqa: N802
        """Run the steps whose requests are complete; whether the transfer is finished. Does not block."""
        while not (self.finished or self._is_advancing) and self._request.Test():
            self._advance()
            if self.finished:
                self._transfers.pending.remove(self)
        return self.finished

    def finish(self) -> T:
        """Block until the transfer is finished, and return its value, once; raises the error of a step that failed."""
        if not self.Test():
            self._transfers.pending.wait_for_any({0: self})
        if self._failure is not None:
            raise self._failure
        value = self._value
        del self._value  # the memory of rows is freed when the caller drops them
        return value

    def received(self, point: Point) -> "Waits[T]":
        """Yield once, as a lane that waits at `point`; return the transfer's value."""
        yield Wait(point, self)
        return self.finish()

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
            self.finished, self._request = True, NO_REQUEST
            self._value: T = end.value
        except BaseException as error:
            self.finished = True
            self._failure = error
            raise
        finally:
            self._is_advancing = False


class Wait(NamedTuple):
    """What a lane yields: it waits at `point` until `transfer` is finished."""

    point: Point
    transfer: Transfer[Any]


Waits = Generator[Wait, None, T]
"""A part of a lane's step, which yields where the lane waits."""
