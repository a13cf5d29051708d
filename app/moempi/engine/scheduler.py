"""The scheduler of a rank: which of its requests each lane computes next. Continuous batching with chunked prefill."""

from collections import deque
from collections.abc import Iterable

import numpy as np

from moempi.engine.sequence import Sequence
from moempi.model.batch import Batch
from moempi.model.kv_cache import pages_for

Work = tuple[Sequence, int]


class Scheduler:
    """Deals the rank's sequences to its lanes. A sequence stays in its lane; its slot is refilled at once.

    Each lane gets `batch_tokens` rows a step at most; all lanes together hold `max_sequences` sequences and `pages`
    pages of cache at most. Every sequence must fit in `pages` alone. With `all_rows` (scoring) a batch wants every
    row that has a next token in its prompt, else the last row of every sequence that has no token left.
    """

    def __init__(
        self,
        sequences: Iterable[Sequence],
        *,
        lanes: int,
        max_sequences: int,
        batch_tokens: int,
        pages: int,
        all_rows: bool,
    ) -> None:
        self._queue = deque(sequences)
        self._active: list[list[Sequence]] = [[] for _ in range(lanes)]
        self._freed: list[int] = []
        self._free_slots = list(range(max(max_sequences, lanes)))
        self._batch_tokens = batch_tokens
        self._pages = pages
        self._all_rows = all_rows

    def unfinished(self, lane: int) -> int:
        """Requests that the lane may still have to compute."""
        return len(self._queue) + len(self._active[lane])

    def next_batch(self, lane: int) -> tuple[Batch, list[Work]]:
        """The lane's next step, and each sequence in it with its number of rows.

        Sequences that generate come first, a row each; what is left of the rows goes to prompts, in order of arrival.
        """
        self._admit(lane)
        left = self._batch_tokens
        work = []
        for sequence in sorted(self._active[lane], key=lambda sequence: sequence.num_waiting > 1):
            rows = min(left, sequence.num_waiting)
            if rows:
                work.append((sequence, rows))
                left -= rows
        freed, self._freed = self._freed, []
        return _batch(work, freed, all_rows=self._all_rows), work

    def retire(self, lane: int) -> list[Sequence]:
        """Take the lane's finished sequences out; their slots and pages are free from the next batch on."""
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


def _batch(work: list[Work], freed: list[int], *, all_rows: bool) -> Batch:
    lengths = np.array([rows for _, rows in work], np.int64)
    complete = np.array([rows == sequence.num_waiting for sequence, rows in work], bool)
    last_rows = np.cumsum(lengths)[complete] - 1
    return Batch(
        tokens=np.array([token for sequence, rows in work for token in sequence.next_tokens(rows)], np.int64),
        slots=np.array([sequence.slot for sequence, _ in work], np.int64),
        starts=np.array([sequence.computed for sequence, _ in work], np.int64),
        lengths=lengths,
        capacities=np.array([sequence.capacity for sequence, _ in work], np.int64),
        wanted=np.setdiff1d(np.arange(lengths.sum()), last_rows) if all_rows else last_rows,
        freed=np.array(freed, np.int64),
    )
