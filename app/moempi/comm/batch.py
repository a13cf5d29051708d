"""The batch: the rows of one lane in one step. The first stage makes it, and each stage sends it with the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray
from moempi.layout.row_split import rows_of

LogitRequests = npt.NDArray[Any]
"""For each row whose logits are needed: a SAMPLING_REQUEST, or the token to score."""


@dataclass(frozen=True)
class Batch:
    """Rows of S sequences, one after another, in ascending order of their KV slots; a step may have no rows.

    Sequence s has `lengths[s]` rows at positions from `starts[s]` on. Its KV slot is `slots[s]`, which holds at most
    `capacities[s]` positions; it is request `requests[s]` of the job, whose prompt has `prompts[s]` tokens. Only the
    first stage has `tokens` (T,). `logit_rows` (N,) are the rows whose logits are needed, ascending, and
    `logit_requests` (N,) their requests. `freed` are the slots whose sequences ended before this step. With `stop`
    there is no step, and none follows.
    """

    tokens: IntArray
    requests: IntArray
    slots: IntArray
    starts: IntArray
    lengths: IntArray
    capacities: IntArray
    logit_rows: IntArray
    freed: IntArray
    prompts: IntArray
    logit_requests: LogitRequests = field(default_factory=lambda: NONE)
    stop: bool = False

    @cached_property
    def num_rows(self) -> int:
        """Rows of all sequences (T)."""
        return int(self.lengths.sum())

    @cached_property
    def positions(self) -> IntArray:
        """Position of every row in its sequence (T,)."""
        first_rows = self.lengths.cumsum() - self.lengths
        return (self.starts - first_rows).repeat(self.lengths) + np.arange(self.num_rows)

    @property
    def row_capacities(self) -> IntArray:
        """Positions that the sequence of every row may have (T,)."""
        return self.capacities.repeat(self.lengths)

    def of_slots(self, slots: range) -> tuple[Self, IntArray]:
        """The sub-batch of the sequences with these slots, without tokens, and the indices of its rows."""
        chosen = np.flatnonzero((self.slots >= slots.start) & (self.slots < slots.stop))
        rows = rows_of(self.lengths, chosen)
        has_logits = np.isin(self.logit_rows, rows)
        part = type(self)(
            tokens=NONE,
            requests=self.requests[chosen],
            slots=self.slots[chosen],
            starts=self.starts[chosen],
            lengths=self.lengths[chosen],
            capacities=self.capacities[chosen],
            logit_rows=np.searchsorted(rows, self.logit_rows[has_logits]),
            freed=self.freed[(self.freed >= slots.start) & (self.freed < slots.stop)],
            prompts=self.prompts[chosen],
            logit_requests=self.logit_requests[has_logits],
            stop=self.stop,
        )
        return part, rows

    def logit_rows_of_slots(self, slots: range) -> IntArray:
        """The indices into `logit_rows` of the rows of these slots."""
        slot_of_row = np.repeat(self.slots, self.lengths)[self.logit_rows]
        return np.flatnonzero((slot_of_row >= slots.start) & (slot_of_row < slots.stop))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Join sub-batches whose slots ascend from one to the next."""
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
            prompts=np.concatenate([part.prompts for part in parts]),
            logit_requests=np.concatenate([part.logit_requests for part in parts]),
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
    prompts=NONE,
    stop=True,
)
