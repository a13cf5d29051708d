"""The scheduler of a rank: the requests that a micro-batch computes next. Continuous batching with chunked prefill."""

from collections import deque
from collections.abc import Iterable
from itertools import accumulate, islice, takewhile
from time import perf_counter

from moempi.engine.request import Request
from moempi.layout.memory import pages_for

Work = tuple[Request, int]
"""A request, and its number of rows in a step."""


class Scheduler:
    """Assigns the requests of a data parallel group to its micro-batches; a request stays in its micro-batch.

    A micro-batch has at most `batch_tokens` rows per step. All together hold at most one request per slot, and their
    requests at most `pages` pages of cache; no request may need more than `pages`. A free slot is refilled before
    the next step.
    """

    def __init__(
        self, requests: Iterable[Request], *, micro_batches: int, slots: range, batch_tokens: int, pages: int
    ) -> None:
        self._queue = deque(requests)
        self._active: list[list[Request]] = [[] for _ in range(micro_batches)]
        self._freed: list[int] = []
        self._free_slots = list(slots)
        self._batch_tokens = batch_tokens
        self._pages = pages

    def submit(self, requests: Iterable[Request]) -> None:
        """Append requests to the queue."""
        self._queue.extend(requests)

    @property
    def num_micro_batches(self) -> int:
        """Number of micro-batches in flight."""
        return len(self._active)

    def unfinished(self, micro_batch: int) -> int:
        """Number of requests that the micro-batch may still have to compute: its own and all queued ones."""
        return len(self._queue) + len(self._active[micro_batch])

    @property
    def num_running(self) -> int:
        """Number of requests that have a slot."""
        return sum(map(len, self._active))

    @property
    def num_unfinished(self) -> int:
        """Number of requests of all micro-batches, and of the queue."""
        return len(self._queue) + self.num_running

    def next_work(self, micro_batch: int) -> list[Work]:
        """The requests of the micro-batch's next step, each with its number of rows, in ascending order of their slots.

        A request that generates gets one row; prompts get the remaining rows, in order of admission.
        """
        self._admit(micro_batch)
        left = self._batch_tokens
        work = []
        for request in sorted(self._active[micro_batch], key=lambda request: request.num_waiting > 1):
            rows = min(left, request.num_waiting)
            if rows:
                work.append((request, rows))
                left -= rows
        return sorted(work, key=lambda item: item[0].slot)

    def take_freed(self) -> list[int]:
        """The slots whose requests finished since the last call."""
        freed, self._freed = self._freed, []
        return freed

    def retire(self, micro_batch: int) -> list[Request]:
        """Remove and return the micro-batch's finished requests; their slots and pages are free from now on."""
        finished = [request for request in self._active[micro_batch] if request.finish is not None]
        self._active[micro_batch] = [request for request in self._active[micro_batch] if request.finish is None]
        for request in finished:
            self._freed.append(request.slot)
            self._free_slots.append(request.slot)
            self._pages += pages_for(request.capacity)
        return finished

    def _admit(self, micro_batch: int) -> None:
        """Admit requests up to the micro-batch's even share of all that slots and pages hold at the same time."""
        num_active, num_admissible = sum(map(len, self._active)), self._num_admissible()
        share = -(-(num_active + num_admissible) // len(self._active))
        for _ in range(min(share - len(self._active[micro_batch]), num_admissible)):
            request = self._queue.popleft()
            request.admitted_at = perf_counter()
            request.slot = self._free_slots.pop(0)
            self._pages -= pages_for(request.capacity)
            self._active[micro_batch].append(request)

    def _num_admissible(self) -> int:
        """Number of queued requests, from the first one on, that free slots and pages hold."""
        needed = accumulate(pages_for(request.capacity) for request in islice(self._queue, len(self._free_slots)))
        return sum(1 for _ in takewhile(lambda pages: pages <= self._pages, needed))
