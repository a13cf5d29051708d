"""The sizes of the rows that the lanes of a run exchange. Pure."""

from dataclasses import dataclass

from moempi.layout.grid import Grid


@dataclass(frozen=True, slots=True)
class RowShape:
    """Rows of `width` elements, each for `top_k` experts; a group of the first stage has up to `group_rows` a step."""

    width: int
    top_k: int
    group_rows: int

    def rank_rows(self, grid: Grid, stage: int, data: int) -> int:
        """The most rows of a step that a rank of this data parallel group holds between its layers."""
        return -(-self.group_rows * len(grid.peers(stage, data, other=0)) // grid.tensor)
