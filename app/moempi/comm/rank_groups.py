"""The groups of ranks that the lanes of a rank communicate in: all ranks, its stage, its tensor group."""

from typing import NamedTuple, Self

from mpi4py import MPI
from msgspec import Struct

from moempi.layout.grid import Grid

TAGS_PER_LANE = 7
"""A lane's messages between stages have the tags from its number times this on: 4,096 lanes are below MPI's limit."""


class LinkComm(NamedTuple):
    """A communicator of all ranks for the messages between stages, and the number to add to their tags."""

    ranks: MPI.Intracomm
    first_tag: int = 0


class RankGroups(Struct, frozen=True):
    """Communicators of all `ranks`, of this rank's `stage`, and of its `tensor` group.

    Collectives of a lane are on duplicates of its own; all lanes send their messages between stages over `ranks`.
    """

    ranks: MPI.Intracomm
    stage: MPI.Intracomm
    tensor: MPI.Intracomm

    @classmethod
    def make(cls, ranks: MPI.Intracomm, grid: Grid) -> Self:
        """The groups of `grid` among `ranks`; collective over each stage alone."""
        coords = grid.coordinates(ranks.rank)
        of_stage = grid.stages[coords.stage].ranks
        group = ranks.Get_group().Range_incl([(of_stage.start, of_stage.stop - 1, 1)])
        stage = MPI.Intracomm(ranks.Create_group(group))
        return cls(ranks, stage, MPI.Intracomm(stage.Split(coords.data, stage.rank)))

    def link(self, lane: int) -> LinkComm:
        """What a lane sends its messages between stages over."""
        return LinkComm(self.ranks, TAGS_PER_LANE * lane)

    def free(self) -> None:
        """Free the communicators of stage and tensor group; collective, blocks."""
        self.stage.Free()
        self.tensor.Free()
