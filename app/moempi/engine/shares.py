"""Rank 0 reads the prompts; each rank of the first stage gets those of its data parallel group."""

from collections.abc import Iterator, Sequence

from moempi.engine.rank_layout import RankLayout
from moempi.runtime.world import World
from moempi.storage.prompts import Prompt

TAG = 32_100
"""Beyond the tags of messages between stages."""
PIECE = 10_000
PIECE_BYTES = 64 << 20
"""Prompts, and bytes of their texts and tokens, that are sent at a time; a larger prompt is sent alone."""


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
    start = num_bytes = 0
    for index, prompt in enumerate(share):
        num_bytes += _num_bytes(prompt)
        if index - start == PIECE or (num_bytes > PIECE_BYTES and index > start):
            yield share[start:index]
            start, num_bytes = index, _num_bytes(prompt)
    if start < len(share):
        yield share[start:]
    yield []


def _num_bytes(prompt: Prompt) -> int:
    """The size of what may be long in a prompt."""
    parts = (prompt.text, prompt.chat, prompt.reference, prompt.metadata, prompt.error)
    return (0 if prompt.tokens is None else prompt.tokens.nbytes) + sum(len(part or "") for part in parts)
