"""Rank 0 reads the prompts; each rank of the first stage gets those of its data parallel group."""

from collections.abc import Iterator, Sequence

from moempi.engine.rank_layout import RankLayout
from moempi.runtime.world import World
from moempi.storage.prompts import Prompt

TAG = 32_100
"""Beyond the tags of messages between stages."""
PIECE = 10_000
"""Prompts that are sent at a time."""


def scatter_prompts(prompts: Sequence[Prompt], world: World, rank_layout: RankLayout) -> list[Prompt]:
    """This rank's share of the `prompts` of rank 0: every n-th, if the first stage has n groups; none beyond it.

    Collective over rank 0 and the first stage, blocks. Memory beside the shares is that of PIECE prompts.
    """
    ranks, grid = rank_layout.ranks, rank_layout.grid
    if world.rank == 0:
        for rank in grid.stages[0].ranks:
            if rank != ranks.rank:
                for piece in _pieces(prompts[grid.coordinates(rank).data :: grid.num_groups(0)]):
                    ranks.send(piece, rank, TAG)
        return list(prompts[rank_layout.coords.data :: grid.num_groups(0)]) if rank_layout.is_first_stage else []
    share: list[Prompt] = []
    while rank_layout.is_first_stage and (piece := ranks.recv(tag=TAG)):
        share += piece
    return share


def _pieces(share: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    """Lists of prompts, of which the last is empty."""
    for start in range(0, len(share), PIECE):
        yield share[start : start + PIECE]
    yield []
