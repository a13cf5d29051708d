"""The table of placements: bytes by level of link, imbalance and time of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from moempi.config.size import format_size
from moempi.observe.console import console, figures_table


@dataclass(frozen=True, slots=True)
class PolicyRow:
    """One placement: bytes and messages of all ranks and layers by level of link, and the busiest rank's time.

    `imbalance` is (max - mean) / mean of the ranks' rows, for each layer.
    """

    name: str
    sent_bytes: tuple[int, ...]
    messages: tuple[int, ...]
    imbalance: tuple[float, ...] = ()
    time_s: float | None = None


def print_policies(rows: Sequence[PolicyRow], *, title: str, levels: Sequence[str]) -> None:
    """Print the table on stdout."""
    console().print(policies_table(rows, title=title, levels=levels))


def policies_table(rows: Sequence[PolicyRow], *, title: str, levels: Sequence[str]) -> Table:
    """One row a placement: bytes by level, messages over the farthest, mean imbalance, time of the busiest rank.

    Levels without messages in any placement are left out, except the farthest.
    """
    last = len(levels) - 1
    used = [level for level in range(last) if any(row.messages[level] for row in rows)] + [last]
    head = ("placement", *(levels[level] for level in used), "messages", "uneven", "busiest")
    caption = f"bytes sent, messages over the {levels[-1]}; uneven: (max - mean)/mean of rows"
    table = figures_table(*head, title=title, caption=caption)
    for row in rows:
        sent = (format_size(row.sent_bytes[level]) for level in used)
        even = f"{fmean(row.imbalance):.3f}" if row.imbalance else ""
        busiest = "" if row.time_s is None else f"{row.time_s * 1e3:.2f} ms"
        table.add_row(row.name, *sent, f"{row.messages[-1]:,}", even, busiest)
    return table
