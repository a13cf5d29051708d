"""The batch: what one lane computes in one step. Decided by the first stage, it travels with the rows. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.protocol import SamplingRequest
from moempi.layout.row_split import rows_of

LogitRequest = SamplingRequest | int


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of S sequences, one after another, in ascending order of their KV slots; a step may have no rows.

    Sequence s occupies `lengths[s]` rows at positions from `starts[s]` on, and KV slot `slots[s]`, which will hold
    `capacities[s]` positions at most. `wanted` (N,) are the rows whose logits are needed, ascending, and `asked` what
    is asked of each: how to choose its next token, or the token to score. `freed` are the slots whose sequences ended
    before this step; `stop` says that there is no step any more. `tokens` (T,) are those of the first stage only;
    `requests` (S,) are the sequences' numbers among the requests of the job.
    """

    tokens: IntArray
    requests: IntArray
    slots: IntArray
    starts: IntArray
    lengths: IntArray
    capacities: IntArray
    logit_rows: IntArray
    freed: IntArray
    logit_requests: Sequence[LogitRequest] = ()
    stop: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of all sequences (T)."""
        return int(self.lengths.sum())

    @property
    def positions(self) -> IntArray:
        """Position of every row in its sequence (T,)."""
        first_rows = np.cumsum(self.lengths) - self.lengths
        return np.repeat(self.starts - first_rows, self.lengths) + np.arange(self.num_rows)

    def of_slots(self, slots: range) -> tuple[Self, IntArray]:
        """The part of the batch whose sequences have these slots, and its rows; without tokens."""
        chosen = np.flatnonzero((self.slots >= slots.start) & (self.slots < slots.stop))
        rows = rows_of(self.lengths, chosen)
        among = np.isin(self.logit_rows, rows)
        part = type(self)(
            tokens=NONE,
            requests=self.requests[chosen],
            slots=self.slots[chosen],
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
            capacities=self.capacities[chosen],
            logit_rows=np.searchsorted(rows, self.logit_rows[among]),
            freed=self.freed[(self.freed >= slots.start) & (self.freed < slots.stop)],
            logit_requests=[asked for asked, kept in zip(self.logit_requests, among, strict=True) if kept],
            stop=self.stop,
        )
        return part, rows

    def logit_rows_of_slots(self, slots: range) -> IntArray:
        """Which of the wanted rows belong to these slots, as indices into `wanted`."""
        slot_of_row = np.repeat(self.slots, self.lengths)[self.logit_rows]
        return np.flatnonzero((slot_of_row >= slots.start) & (slot_of_row < slots.stop))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """One batch of several whose slots ascend from part to part."""
        firsts = np.cumsum([0, *(part.num_rows for part in parts)])
        return cls(
            tokens=NONE,
            requests=np.concatenate([part.requests for part in parts]),
            slots=np.concatenate([part.slots for part in parts]),
            starts=np.concatenate([part.starts for part in parts]),
            lengths=np.concatenate([part.lengths for part in parts]),
            capacities=np.concatenate([part.capacities for part in parts]),
            logit_rows=np.concatenate([part.logit_rows + first for part, first in zip(parts, firsts, strict=False)]),
            freed=np.concatenate([part.freed for part in parts]),
            logit_requests=[request for part in parts for request in part.logit_requests],
            stop=any(part.stop for part in parts),
        )


NONE: IntArray = np.zeros(0, np.int64)
NO_STEP = Batch(
    tokens=NONE,
    requests=NONE,
    slots=NONE,
    starts=NONE,
    lengths=NONE,
    capacities=NONE,
    logit_rows=NONE,
    freed=NONE,
    stop=True,
)
