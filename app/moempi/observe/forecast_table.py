"""What a person reads of a job on a machine that need not be there."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from moempi.observe.console import console


@dataclass(frozen=True, slots=True)
class StageLine:
    """Stages `first` to `last`, which are alike: a lane's step, and a turn of all lanes that they take together."""

    kind: str
    first: int
    last: int
    compute_s: float
    travel_s: float
    waiting_s: float
    overlapped_s: float


@dataclass(frozen=True, slots=True)
class TotalLine:
    """Tokens a second without and with overlap, and seconds from a sequence's token to its next."""

    kind: str
    waiting_tokens_s: float
    overlapped_tokens_s: float
    token_s: float


def print_forecast(stages: Sequence[StageLine], totals: Sequence[TotalLine], *, machine: str) -> None:
    """Print both tables on stdout."""
    console().print(_stages(stages), _totals(totals), f"A model's forecast, not a measurement, of: {machine}")


def _stages(lines: Sequence[StageLine]) -> Table:
    table = _table("step", "stages", "compute ms", "travel ms", "waiting ms", "overlapped ms")
    table.caption = "a lane's step: it computes, its rows travel; a turn of a stage's lanes: waiting, overlapped"
    for line in lines:
        name = f"{line.first}" if line.first == line.last else f"{line.first} to {line.last}"
        spans = (line.compute_s, line.travel_s, line.waiting_s, line.overlapped_s)
        table.add_row(line.kind, name, *(f"{span * 1e3:.3f}" for span in spans))
    return table


def _totals(lines: Sequence[TotalLine]) -> Table:
    table = _table("step", "waiting token/s", "overlapped token/s", "gain", "ms a token")
    for line in lines:
        gain = line.overlapped_tokens_s / line.waiting_tokens_s
        rates = (f"{rate:,.0f}" for rate in (line.waiting_tokens_s, line.overlapped_tokens_s))
        table.add_row(line.kind, *rates, f"{gain:.2f}", f"{line.token_s * 1e3:.1f}")
    return table


def _table(*head: str) -> Table:
    return Table(*(Column(name, no_wrap=True) for name in head), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
