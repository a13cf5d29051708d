"""Rank 0 has the prompts; each rank of the first stage gets its group's prompts, a piece at a time."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from moempi.engine.rank_layout import RankLayout
from moempi.errors import MoempiError
from moempi.runtime.waiting import receive_bytes, send_bytes
from moempi.runtime.world import World
from moempi.storage.prompt_spool import PromptCodec, num_bytes
from moempi.storage.prompts import Prompt

TAG = 32_100
"""Beyond the tags of messages between stages."""
PIECE = 1024
PIECE_BYTES = 64 << 20
"""Prompts of a group, and bytes of texts and tokens of all groups, at a time; a larger prompt is sent alone."""


def scatter_prompts(
    prompts: Iterable[Prompt], codec: PromptCodec, world: World, rank_layout: RankLayout
) -> Iterator[list[Prompt]]:
    """Yield this rank's share of the `prompts` of rank 0 in pieces: every n-th, if the first stage has n groups.

    Ranks beyond it have none. The ranks of a group get the same pieces. Collective over rank 0 and the first stage:
    each takes all pieces. Blocks. Memory is that of a piece of all groups. A MoempiError of `prompts` ends the
    pieces of all ranks, and is raised on rank 0.
    """
    if world.rank == 0:
        yield from _scatter(prompts, codec, rank_layout)
        return
    while rank_layout.is_first_stage and (piece := codec.decode(receive_bytes(rank_layout.ranks, tag=TAG))):
        yield piece


def _send(pieces: Sequence[bytes], others: Sequence[tuple[int, int]], ranks: Any) -> None:
    """Send pieces[group] to every (rank, group) of the `others`, b"" to none; blocks."""
    send_bytes(ranks, [(rank, pieces[group]) for rank, group in others if pieces[group]], tag=TAG)


def _scatter(prompts: Iterable[Prompt], codec: PromptCodec, rank_layout: RankLayout) -> Iterator[list[Prompt]]:
    ranks, coords, grid = rank_layout.ranks, rank_layout.coords, rank_layout.grid
    others = [(rank, grid.coordinates(rank).data) for rank in grid.stages[0].ranks if rank != ranks.rank]
    failure = None
    try:
        for shares in _shares(prompts, grid.num_groups(0)):
            _send([codec.encode(share) if share and others else b"" for share in shares], others, ranks)
            if rank_layout.is_first_stage and shares[coords.data]:
                yield shares[coords.data]
    except MoempiError as error:
        failure = error
    _send([codec.encode(())] * grid.num_groups(0), others, ranks)
    if failure is not None:
        raise failure


def _shares(prompts: Iterable[Prompt], num_groups: int) -> Iterator[list[list[Prompt]]]:
    """Yield the next prompts of each group."""
    shares: list[list[Prompt]] = [[] for _ in range(num_groups)]
    held = held_bytes = 0
    for number, prompt in enumerate(prompts):
        size = num_bytes(prompt)
        if held == PIECE * num_groups or (held and held_bytes + size > PIECE_BYTES):
            yield shares
            shares, held, held_bytes = [[] for _ in range(num_groups)], 0, 0
        shares[number % num_groups].append(prompt)
        held, held_bytes = held + 1, held_bytes + size
    if held:
        yield shares
