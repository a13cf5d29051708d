"""The division of a step's rows among the ranks of a tensor group. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moempi.arrays import IntArray


@dataclass(frozen=True)
class RowSplit:
    """A division of rows into `parts`, one per rank of a tensor group.

    `contributions` are the numbers of rows from each source, which are concatenated. Each contribution is divided by
    itself, so a sender knows which rows a receiver keeps without knowing the other contributions.
    """

    contributions: tuple[int, ...]
    parts: int

    @cached_property
    def indices(self) -> tuple[IntArray, ...]:
        """The rows of each part, ascending."""
        if self.parts == 1:
            return (np.arange(sum(self.contributions)),)
        firsts = np.cumsum([0, *self.contributions])
        return tuple(
            np.concatenate(
                [
                    first + part_range(rows, self.parts, part)
                    for first, rows in zip(firsts[:-1], self.contributions, strict=True)
                ]
                or [np.zeros(0, np.int64)]
            )
            for part in range(self.parts)
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of rows of each part."""
        return tuple(len(index) for index in self.indices)

    def divide(self, rows: IntArray) -> list[IntArray]:
        """For each part, the indices into `rows` of the rows that are in it."""
        if self.parts == 1:
            return [np.arange(len(rows))]
        return [np.flatnonzero(np.isin(rows, part)) for part in self.indices]

    @cached_property
    def by_part(self) -> IntArray | None:
        """All rows, part by part (T,); None if this is their own order."""
        return np.concatenate(self.indices) if self.parts > 1 and len(self.contributions) > 1 else None

    @cached_property
    def by_row(self) -> IntArray | None:
        """The position of each row in `by_part` (T,); None if this is its own position."""
        return None if self.by_part is None else np.argsort(self.by_part)


def part_range(rows: int, parts: int, part: int) -> IntArray:
    """The rows of one part of a contribution of `rows` rows."""
    return np.arange(part * rows // parts, (part + 1) * rows // parts)


def rows_of(lengths: Sequence[int] | IntArray, chosen: IntArray) -> IntArray:
    """The rows of the chosen segments, ascending, where consecutive segments have lengths[s] rows."""
    is_chosen = np.zeros(len(lengths), np.bool_)
    is_chosen[chosen] = True
    return np.flatnonzero(np.repeat(is_chosen, lengths))
