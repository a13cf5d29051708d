"""Kills of runs that score and record all they can, at a record of any rank; resumed in another layout."""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from faults.rehearsal import Rehearsal

RANKS = 4
KILLED = "SIGKILL at a recorded value"
SETTINGS = {
    "task": "score",
    "score.top_n": "3",
    "score.threshold": "-4.0",
    "trace.statistics": "true",
    "run.max_sequences": "4",
    "run.batch_tokens": "16",
}
LAYOUTS: tuple[dict[str, str], ...] = (
    {},
    {"parallel.stages": "2"},
    {"parallel.stages": "2", "exchange.immediate": "true"},
)


def cases(folder: Path, dice: random.Random, kills: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each layout in turn, killed at a random record of a random rank."""
    made: list[Rehearsal] = []

    def rehearsal() -> Rehearsal:
        if not made:
            (folder / "scoring").mkdir()
            made.append(Rehearsal(folder / "scoring", num_prompts=48, settings=SETTINGS))
        return made[0]

    for number in range(kills):
        layout, rank, record = LAYOUTS[number % len(LAYOUTS)], dice.randrange(RANKS), dice.randint(1, 12)
        yield KILLED, partial(_kill, rehearsal, layout, rank=rank, record=record, ranks_after=dice.choice((1, 2, 3)))


def _kill(make: Callable[[], Rehearsal], layout: dict[str, str], *, rank: int, record: int, ranks_after: int) -> None:
    """Kill a rank at its `record`-th record, then finish on other ranks in one stage."""
    rehearsal = make()
    results = rehearsal.fresh()
    process = rehearsal.start(results, "SIGKILL", rank=rank, point="append", count=record, num_ranks=RANKS, **layout)
    rehearsal.require_clean_end(process, results, injected_at=None)
    rehearsal.finish(results, num_ranks=ranks_after)
