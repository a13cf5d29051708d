"""Whether the ranks hang, and which rank is at fault, from the positions of all ranks. Pure."""

from collections.abc import Mapping, Sequence

from msgspec import Struct

MAX_NAMED_RANKS = 4
# Reading weights and merging results may take this many times longer than any step.
OUTSIDE_FACTOR = 10


class Position(Struct, frozen=True):
    """How far a rank has come: the number of points it has passed, and the last of them, `where`.

    `doing` is the line that its main thread executes now, `since_s` the seconds since the last point. Ranks of one
    `group` pass the same points in the same order; the group is None before the first step and after the last.
    """

    group: int | None
    passed: int
    where: str
    doing: str
    since_s: float


def above(rank: int) -> list[int]:
    """The ranks above a rank in a binary tree whose root is rank 0, the nearest first."""
    ranks = []
    while rank:
        rank = (rank - 1) // 2
        ranks.append(rank)
    return ranks


def seconds_to_hang(positions: Mapping[int, Position], size: int, *, timeout_s: float) -> float:
    """The seconds after which the ranks hang if none passes a point meanwhile; at most 0 if they do.

    They do if one of the `size` ranks gave no position, or no rank passed a point within the timeout.
    """
    if len(positions) < size:
        return 0.0
    factor = OUTSIDE_FACTOR if any(position.group is None for position in positions.values()) else 1
    return timeout_s * factor - min(position.since_s for position in positions.values())


def explain(positions: Mapping[int, Position], hosts: Sequence[str]) -> str:
    """One phrase that names the ranks at fault, as far as the positions show them; hosts[rank] is a rank's host.

    The hosts are named if there are several.
    """
    silent = [rank for rank in range(len(hosts)) if rank not in positions]
    if silent:
        rank, position = min(positions.items())
        verb = "does" if len(silent) == 1 else "do"
        return f"{rank_names(silent, hosts)} {verb} not answer, rank {rank} waits at {position.where}"
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
        f"{rank_names([last], hosts)} is late, at {late[last].where} (in {late[last].doing}), "
        f"rank {waiting} waits at {positions[waiting].where}"
    )


def rank_names(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """The first MAX_NAMED_RANKS of `ranks` and their hosts, which are named if hosts (R,) of all ranks differ."""
    own = list(dict.fromkeys(hosts[rank] for rank in ranks)) if len(set(hosts)) > 1 else []
    return f"rank{'s' * (len(ranks) > 1)} {_first(ranks)}" + (f" on {_first(own)}" if own else "")


def _first(names: Sequence[object]) -> str:
    more = f" and {len(names) - MAX_NAMED_RANKS} more" if len(names) > MAX_NAMED_RANKS else ""
    return ", ".join(map(str, names[:MAX_NAMED_RANKS])) + more
