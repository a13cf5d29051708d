"""Why no rank moves on: who does not answer, who is late, and who waits for them. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

NAMED = 4
# Reading weights and merging results may take longer than any step, this many times.
OUTSIDE_PATIENCE = 10


@dataclass(frozen=True, slots=True)
class Position:
    """Where a rank stands: how many points it has passed, the last of them, what its main thread does since, how long.

    Ranks of one `group` pass the same points in the same order; None is outside of the steps, at the start or the end.
    """

    group: int | None
    passed: int
    where: str
    doing: str
    since_s: float


def is_hang(positions: Mapping[int, Position], size: int, *, timeout_s: float) -> bool:
    """Whether to give up: a rank does not answer, or all have stood still for longer than they may."""
    if len(positions) < size:
        return True
    patience = OUTSIDE_PATIENCE if any(position.group is None for position in positions.values()) else 1
    return all(position.since_s > timeout_s * patience for position in positions.values())


def explain(positions: Mapping[int, Position], size: int) -> str:
    """One phrase that names the ranks at fault, as far as the positions that were reported tell."""
    silent = [rank for rank in range(size) if rank not in positions]
    if silent:
        rank, position = min(positions.items())
        return f"{_ranks(silent)} not answer, rank {rank} waits at {position.where}"
    most: dict[int | None, int] = {}
    for position in positions.values():
        most[position.group] = max(position.passed, most.get(position.group, 0))
    late = {rank: position for rank, position in positions.items() if position.passed < most[position.group]}
    if not late:
        return f"all ranks wait, rank 0 at {positions[0].where}"
    last = min(late, key=lambda rank: (late[rank].passed, rank))
    waiting = next(
        rank for rank, position in positions.items() if rank not in late and position.group == late[last].group
    )
    return (
        f"rank {last} is late, at {late[last].where} (in {late[last].doing}), "
        f"rank {waiting} waits at {positions[waiting].where}"
    )


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} does"
    more = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"ranks {', '.join(map(str, ranks[:NAMED]))}{more} do"
