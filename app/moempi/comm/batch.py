"""The batch: what one lane computes in one step. Decided by the first stage, it travels with the rows. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from moempi.backend.protocol import Choice
from moempi.layout.row_split import rows_of

IntArray = npt.NDArray[np.integer]
Asked = Choice | int


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
    wanted: IntArray
    freed: IntArray
    asked: Sequence[Asked] = ()
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
        among = np.isin(self.wanted, rows)
        part = type(self)(
            tokens=NONE,
            requests=self.requests[chosen],
            slots=self.slots[chosen],
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
            capacities=self.capacities[chosen],
            wanted=np.searchsorted(rows, self.wanted[among]),
            freed=self.freed[(self.freed >= slots.start) & (self.freed < slots.stop)],
            asked=[asked for asked, kept in zip(self.asked, among, strict=True) if kept],
            stop=self.stop,
        )
        return part, rows

    def wanted_of_slots(self, slots: range) -> IntArray:
        """Which of the wanted rows belong to these slots, as indices into `wanted`."""
        slot_of_row = np.repeat(self.slots, self.lengths)[self.wanted]
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
            wanted=np.concatenate([part.wanted + first for part, first in zip(parts, firsts, strict=False)]),
            freed=np.concatenate([part.freed for part in parts]),
            asked=[asked for part in parts for asked in part.asked],
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
    wanted=NONE,
    freed=NONE,
    stop=True,
)
