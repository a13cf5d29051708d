"""What a person reads before a run (its layout), at its end (its figures), and of its answers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from moempi.config.size import format_size
from moempi.observe.console import console


@dataclass(frozen=True, slots=True)
class Layout:
    """Who does what in a run, one entry per rank: its node, its experts of each layer, its bytes by purpose.

    `refused` lists what would end the run.
    """

    title: str
    nodes: Sequence[int]
    hosted: Sequence[int]
    memory: Sequence[Mapping[str, int]]
    refused: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of a finished run.

    `seconds` holds, for each phase (compute, exchange, idle), one number per rank; `expert_load` (L, E) counts the
    tokens routed to each expert of each MoE layer by all ranks; `exact` of `referenced` answers equal their reference.
    """

    results: str
    tokens: int
    wall_s: float
    seconds: Mapping[str, Sequence[float]]
    expert_load: NDArray[np.int64]
    finishes: Mapping[str, int]
    exact: int = 0
    referenced: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request as a person reads it."""

    prompt: str
    text: str
    reference: str | None


def print_layout(layout: Layout) -> None:
    """Print what a dry run found on stdout."""
    console().print(layout_table(layout))


def print_report(report: Report) -> None:
    """Print the table at the end of a run on stdout."""
    console().print(report_table(report))


def print_answers(answers: Iterable[Answer]) -> None:
    """Print prompts beside what was answered on stdout."""
    console().print(answers_table(answers))


def layout_table(layout: Layout) -> RenderableType:
    """One row per rank, then what would be refused."""
    purposes = list(layout.memory[0]) if layout.memory else []
    table = Table("rank", "node", "experts per layer", *purposes, "total", title=escape(layout.title))
    for rank, (node, hosted, memory) in enumerate(zip(layout.nodes, layout.hosted, layout.memory, strict=True)):
        sizes = [*memory.values(), sum(memory.values())]
        table.add_row(str(rank), str(node), str(hosted), *map(format_size, sizes))
    return Group(table, *(f"refused: {escape(reason)}" for reason in layout.refused))


def report_table(report: Report) -> RenderableType:
    """One row per figure."""
    table = Table("figure", "value")
    rate = report.tokens / report.wall_s if report.wall_s > 0 else 0.0
    table.add_row("tokens/s", f"{rate:,.1f}  ({report.tokens:,} tokens in {report.wall_s:.2f} s)")
    for phase, low, mean, high in phase_shares(report.seconds):
        table.add_row(f"{phase}, share of time", f"{mean:.1%}  (ranks from {low:.1%} to {high:.1%})")
    if report.expert_load.size:
        layers = imbalance(report.expert_load)
        table.add_row("expert imbalance, max/mean", f"{layers.mean():.2f}  (worst layer {layers.max():.2f})")
    table.add_row("finished", ", ".join(f"{reason} {count:,}" for reason, count in sorted(report.finishes.items())))
    if report.referenced:
        share = report.exact / report.referenced
        table.add_row("exact matches", f"{report.exact:,} of {report.referenced:,}  ({share:.1%})")
    table.add_row("results", escape(report.results))
    return table


def answers_table(answers: Iterable[Answer]) -> RenderableType:
    """One row per request; control characters are escaped."""
    table = Table("prompt", "answer", "reference", "")
    for answer in answers:
        known = answer.reference is not None
        mark = ("exact" if answer.text == answer.reference else "differs") if known else ""
        table.add_row(*map(_visible, (answer.prompt, answer.text, answer.reference or "")), mark)
    return table


def phase_shares(seconds: Mapping[str, Sequence[float]]) -> list[tuple[str, float, float, float]]:
    """Each phase with the least, mean and greatest share that it has of a rank's time."""
    totals = [sum(of_rank) for of_rank in zip(*seconds.values(), strict=True)]
    shares = {
        phase: [part / total if total > 0 else 0.0 for part, total in zip(parts, totals, strict=True)]
        for phase, parts in seconds.items()
    }
    return [(phase, min(parts), fmean(parts), max(parts)) for phase, parts in shares.items() if parts]


def imbalance(expert_load: NDArray[np.int64]) -> NDArray[np.float64]:
    """Load of the busiest expert over the mean load, per layer (L,); 1 is even, and said of a layer without tokens."""
    mean = expert_load.mean(axis=1)
    ratio = np.ones(len(mean))
    np.divide(expert_load.max(axis=1), mean, out=ratio, where=mean > 0)
    return ratio


def _visible(text: str) -> str:
    return escape("".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text))
