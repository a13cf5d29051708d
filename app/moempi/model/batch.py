"""The batch: what one lane computes in one step."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of S sequences, one after another; a step without work has no rows.

    Sequence s occupies `lengths[s]` rows at positions from `starts[s]` on, and KV slot `slots[s]`, which will hold
    `capacities[s]` positions at most. `wanted` (N,) are the rows whose logits are needed. `freed` are the slots whose
    sequences ended before this step.
    """

    tokens: IntArray
    slots: IntArray
    starts: IntArray
    lengths: IntArray
    capacities: IntArray
    wanted: IntArray
    freed: IntArray

    @property
    def positions(self) -> IntArray:
        """Position of every row in its sequence (T,)."""
        first_rows = np.cumsum(self.lengths) - self.lengths
        return np.repeat(self.starts - first_rows, self.lengths) + np.arange(len(self.tokens))
