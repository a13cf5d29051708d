"""The sizes of the rows that a run exchanges. Pure."""

from msgspec import Struct

from moempi.layout.grid import Grid


class RowShape(Struct, frozen=True):
    """Rows of `width` elements for `top_k` experts each, to which they are sent as rows of `routed_width` elements.

    A data parallel group of the first stage has at most `group_rows` rows in a step.
    """

    width: int
    top_k: int
    group_rows: int
    latent_width: int = 0

    @property
    def routed_width(self) -> int:
        """Elements of a row on its way to an expert and back: `latent_width` if it is not 0."""
        return self.latent_width or self.width

    def rank_rows(self, grid: Grid, stage: int, data: int) -> int:
        """The most rows of a step that a rank of data parallel group `data` of `stage` holds between its layers."""
        return -(-self.group_rows * len(grid.peers(stage, data, other=0)) // grid.tensor)
