"""The scheduler of a rank: the requests that a micro-batch computes next. Continuous batching with chunked prefill."""

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import accumulate, chain, islice, takewhile
from time import perf_counter

import numpy as np

from moempi.arrays import IntArray
from moempi.engine.request import Request
from moempi.engine.sequences import Sequences, Work
from moempi.layout.memory import pages_for


class Scheduler:
    """Assigns the requests of a data parallel group to its micro-batches; a request stays in its micro-batch.

    A micro-batch has at most `batch_tokens` rows per step. All together hold at most one request per slot, and their
    requests at most `pages` pages of cache; no request may need more than `pages`. A free slot is refilled before
    the next step. `sequences` are the requests that have a slot.
    """

    expects_more = False
    """Whether more requests will be submitted when these run short."""

    def __init__(
        self, requests: Collection[Request], *, micro_batches: int, slots: range, batch_tokens: int, pages: int
    ) -> None:
        self._queue = deque[Request]()
        """The first queued requests; the others are still in `_source`."""
        self._source: Iterator[Request] = iter(())
        self._num_in_source = 0
        self.sequences = Sequences(slots)
        self._active: list[IntArray] = [np.zeros(0, np.int64)] * micro_batches
        """The sequences of each micro-batch, in order of admission."""
        self._freed: list[int] = []
        self._free = deque(range(len(slots)))
        self._batch_tokens = batch_tokens
        self._pages = pages
        self.submit(requests, count=len(requests))

    def submit(self, requests: Iterable[Request], *, count: int) -> None:
        """Append `count` requests to the queue, which takes each of them when it is needed."""
        self._source = chain(self._source, requests) if self._num_in_source else iter(requests)
        self._num_in_source += count

    def first(self, count: int) -> list[Request]:
        """The first `count` requests of the queue, or all that there are."""
        missing = min(max(count - len(self._queue), 0), self._num_in_source)
        self._queue.extend(islice(self._source, missing))
        self._num_in_source -= missing
        if not self._num_in_source:
            self._source = iter(())
        return list(islice(self._queue, count))

    @property
    def num_queued(self) -> int:
        """Number of requests in the queue."""
        return len(self._queue) + self._num_in_source

    @property
    def is_short(self) -> bool:
        """Whether the queue could not fill all slots again, although more requests are expected."""
        return self.expects_more and self.num_queued < len(self.sequences.slots)

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in flight."""
        return len(self._active)

    def unfinished(self, micro_batch: int) -> int:
        """Number of requests that the micro-batch may still have to compute: its own and all queued ones."""
        return self.num_queued + len(self._active[micro_batch])

    @property
    def num_running(self) -> int:
        """Number of requests that have a slot."""
        return sum(map(len, self._active))

    @property
    def num_unfinished(self) -> int:
        """Number of requests of all micro-batches, and of the queue."""
        return self.num_queued + self.num_running

    def next_work(self, micro_batch: int) -> Work:
        """The micro-batch's next step.

        A request that generates gets one row; prompts get the remaining rows, in order of admission.
        """
        self._admit(micro_batch)
        active = self._active[micro_batch]
        active = active[(self.sequences.waiting(active) > 1).argsort(kind="stable")]
        waiting = self.sequences.waiting(active)
        left = self._batch_tokens - (waiting.cumsum() - waiting)
        lengths = np.minimum(waiting, np.maximum(left, 0))
        by_slot = active.argsort()
        by_slot = by_slot[lengths[by_slot] > 0]
        return self.sequences.work(active[by_slot], lengths[by_slot])

    def take_freed(self) -> IntArray:
        """The slots whose requests finished since the last call."""
        freed, self._freed = self._freed, []
        return self.sequences.slots[np.array(freed, np.int64)]

    def retire(self, micro_batch: int) -> list[Request]:
        """Remove and return the micro-batch's finished requests; their slots and pages are free from now on."""
        active = self._active[micro_batch]
        finished = self.sequences.finished[active]
        self._active[micro_batch] = active[~finished]
        numbers = active[finished].tolist()
        requests = [self.sequences.end(number) for number in numbers]
        self._freed.extend(numbers)
        self._free.extend(numbers)
        self._pages += sum(pages_for(request.capacity) for request in requests)
        return requests

    def _admit(self, micro_batch: int) -> None:
        """Admit requests up to the micro-batch's even share of all that slots and pages hold at the same time."""
        if not self.num_queued:
            return
        num_active, num_admissible = self.num_running, self._num_admissible()
        share = -(-(num_active + num_admissible) // len(self._active))
        admitted = []
        for _ in range(min(share - len(self._active[micro_batch]), num_admissible)):
            request, number = self._queue.popleft(), self._free.popleft()
            request.admitted_at = perf_counter()
            self._pages -= pages_for(request.capacity)
            self.sequences.begin(number, request)
            admitted.append(number)
        if admitted:
            self._active[micro_batch] = np.append(self._active[micro_batch], admitted)

    def _num_admissible(self) -> int:
        """Number of queued requests, from the first one on, that free slots and pages hold."""
        needed = accumulate(pages_for(request.capacity) for request in self.first(len(self._free)))
        return sum(1 for _ in takewhile(lambda pages: pages <= self._pages, needed))
