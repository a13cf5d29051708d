"""The scheduler of a rank: the requests that each lane computes next. Continuous batching with chunked prefill."""

from collections import deque
from collections.abc import Iterable

from moempi.engine.request import Request
from moempi.model.kv_cache import pages_for

Work = tuple[Request, int]
"""A request, and its number of rows in a step."""


class Scheduler:
    """Assigns the requests of a data parallel group to its lanes; a request stays in its lane.

    A lane computes at most `batch_tokens` rows per step. All lanes together hold at most one request per slot, and
    their requests at most `pages` pages of cache; no request may need more than `pages`. A free slot is refilled before
    the next step.
    """

    def __init__(self, requests: Iterable[Request], *, lanes: int, slots: range, batch_tokens: int, pages: int) -> None:
        self._queue = deque(requests)
        self._active: list[list[Request]] = [[] for _ in range(lanes)]
        self._freed: list[int] = []
        self._free_slots = list(slots)
        self._batch_tokens = batch_tokens
        self._pages = pages

    def submit(self, requests: Iterable[Request]) -> None:
        """Append requests to the queue."""
        self._queue.extend(requests)

    def unfinished(self, lane: int) -> int:
        """Number of requests that the lane may still have to compute: its own and all queued ones."""
        return len(self._queue) + len(self._active[lane])

    @property
    def has_work(self) -> bool:
        """Whether any lane has requests left."""
        return bool(self._queue) or any(self._active)

    def next_work(self, lane: int) -> list[Work]:
        """The requests of the lane's next step, each with its number of rows, in ascending order of their slots.

        A request that generates gets one row; prompts get the remaining rows, in order of admission.
        """
        self._admit(lane)
        left = self._batch_tokens
        work = []
        for request in sorted(self._active[lane], key=lambda request: request.num_waiting > 1):
            rows = min(left, request.num_waiting)
            if rows:
                work.append((request, rows))
                left -= rows
        return sorted(work, key=lambda item: item[0].slot)

    def take_freed(self) -> list[int]:
        """The slots whose requests finished since the last call."""
        freed, self._freed = self._freed, []
        return freed

    def retire(self, lane: int) -> list[Request]:
        """Remove and return the lane's finished requests; their slots and pages are free from now on."""
        finished = [request for request in self._active[lane] if request.finish is not None]
        self._active[lane] = [request for request in self._active[lane] if request.finish is None]
        for request in finished:
            self._freed.append(request.slot)
            self._free_slots.append(request.slot)
            self._pages += pages_for(request.capacity)
        return finished

    def _admit(self, lane: int) -> None:
        """Admit requests up to the lane's even share of the unfinished ones, while slots and pages are free."""
        share = -(-(len(self._queue) + sum(map(len, self._active))) // len(self._active))
        while self._queue and self._free_slots and len(self._active[lane]) < share:
            pages = pages_for(self._queue[0].capacity)
            if pages > self._pages:
                return
            request = self._queue.popleft()
            request.slot = self._free_slots.pop(0)
            self._pages -= pages
            self._active[lane].append(request)
