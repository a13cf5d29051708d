"""The scheduler of a rank: which of its requests each lane computes next. Continuous batching with chunked prefill."""

from collections import deque
from collections.abc import Iterable

from moempi.engine.request import Request
from moempi.model.kv_cache import pages_for

Work = tuple[Request, int]


class Scheduler:
    """Deals the sequences of a data parallel group to its lanes. A sequence stays in its lane.

    Each lane gets `batch_tokens` rows a step at most; all lanes together hold as many sequences as there are `slots`
    and `pages` pages of cache at most. A slot is refilled at once. Every sequence must fit in `pages` alone.
    """

    def __init__(self, requests: Iterable[Request], *, lanes: int, slots: range, batch_tokens: int, pages: int) -> None:
        self._queue = deque(requests)
        self._active: list[list[Request]] = [[] for _ in range(lanes)]
        self._freed: list[int] = []
        self._free_slots = list(slots)
        self._batch_tokens = batch_tokens
        self._pages = pages

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue more sequences, behind all others."""
        self._queue.extend(requests)

    def unfinished(self, lane: int) -> int:
        """Requests that the lane may still have to compute."""
        return len(self._queue) + len(self._active[lane])

    @property
    def has_work(self) -> bool:
        """Whether any lane has requests left."""
        return bool(self._queue) or any(self._active)

    def next_work(self, lane: int) -> list[Work]:
        """The sequences of the lane's next step, each with its number of rows, in ascending order of their slots.

        Sequences that generate have a row each; what is left of the rows goes to prompts, in order of arrival.
        """
        self._admit(lane)
        left = self._batch_tokens
        work = []
        for sequence in sorted(self._active[lane], key=lambda sequence: sequence.num_waiting > 1):
            rows = min(left, sequence.num_waiting)
            if rows:
                work.append((sequence, rows))
                left -= rows
        return sorted(work, key=lambda item: item[0].slot)

    def take_freed(self) -> list[int]:
        """The slots whose sequences ended since the last call."""
        freed, self._freed = self._freed, []
        return freed

    def retire(self, lane: int) -> list[Request]:
        """Take the lane's finished sequences out; their slots and pages are free from the next step of any lane on."""
        finished = [sequence for sequence in self._active[lane] if sequence.finish is not None]
        self._active[lane] = [sequence for sequence in self._active[lane] if sequence.finish is None]
        for sequence in finished:
            self._freed.append(sequence.slot)
            self._free_slots.append(sequence.slot)
            self._pages += pages_for(sequence.capacity)
        return finished

    def _admit(self, lane: int) -> None:
        """Fill the lane up to its even share of what is unfinished, as far as slots and pages reach."""
        share = -(-(len(self._queue) + sum(map(len, self._active))) // len(self._active))
        while self._queue and self._free_slots and len(self._active[lane]) < share:
            pages = pages_for(self._queue[0].capacity)
            if pages > self._pages:
                return
            sequence = self._queue.popleft()
            sequence.slot = self._free_slots.pop(0)
            self._pages -= pages
            self._active[lane].append(sequence)
