"""Tables about a run: its layout, its report, its outputs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from moempi.config.size import format_size
from moempi.observe.console import console, figures_table, numbered_runs
from moempi.observe.run_figures import Report
from moempi.printing import print_line
from moempi.storage.records import Scores

NUM_STRAGGLERS = 3
MIN_SHARE = 0.01
SENT_ROWS = {"": "rows to experts", "stage": "rows to the next stage", "tensor": "rows of tensor groups"}


@dataclass(frozen=True, slots=True)
class StageRow:
    """One stage of a layout: its counts, its experts per rank and layer, and bytes of its fullest rank by purpose.

    With the cache of `sequences` sequences of a group at a time the rank needs `total` bytes.
    """

    layers: int
    ranks: int
    nodes: int
    groups: int
    experts: str
    memory: Mapping[str, int]
    sequences: int
    total: int


@dataclass(frozen=True, slots=True)
class LayoutTable:
    """The layout of a run by stage; a sequence has `context` tokens; `refused` lists the errors that end the run.

    `recorded` are the bytes of a position in the results, for each table of recorded values.
    """

    title: str
    stages: Sequence[StageRow]
    context: int
    refused: Sequence[str] = ()
    recorded: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OutputRow:
    """The texts of one request: its prompt, its output, its reference or None, and its error, "" without one."""

    prompt: str
    text: str
    reference: str | None
    error: str = ""


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The scores of one request: its prompt, the log-probabilities of its tokens, and its error, "" without one."""

    prompt: str
    scores: Scores
    error: str = ""


def print_layout(layout: LayoutTable) -> None:
    """Print the layout on stdout, then one line an error."""
    console().print(layout.title, stage_table(layout), memory_table(layout))
    if layout.recorded:
        tables = ", ".join(
            f"{name} {'at most ' * (name == 'above')}{num_bytes:,}" for name, num_bytes in layout.recorded.items()
        )
        print_line(f"recorded bytes of a token in the results: {tables}")
    for reason in layout.refused:
        print_line(f"refused: {reason}")


def print_report(report: Report) -> None:
    """Print the report on stdout."""
    console().print(report_table(report))


def print_outputs(outputs: Iterable[OutputRow]) -> None:
    """Print prompts and outputs on stdout."""
    console().print(outputs_table(outputs))


def print_scores(scored: Iterable[ScoreRow]) -> None:
    """Print prompts and their scores on stdout."""
    console().print(scores_table(scored))


def stage_table(layout: LayoutTable) -> Table:
    """The counts of the stages, one row for all adjacent stages that are equal."""
    table = figures_table("stages", "layers", "ranks", "nodes", "groups", "experts")
    table.caption = "of a stage: layers, ranks, nodes, data parallel groups; of a rank: experts of a layer"
    for name, row in numbered_runs(layout.stages):
        table.add_row(name, *map(str, (row.layers, row.ranks, row.nodes, row.groups)), row.experts)
    return table


def memory_table(layout: LayoutTable) -> Table:
    """The memory of the fullest rank of the stages, one row for all adjacent stages that are equal."""
    table = figures_table("stages", *(layout.stages[0].memory if layout.stages else []), "sequences", "total")
    table.caption = (
        f"bytes of the fullest rank of a stage; sequences of {layout.context:,} tokens that a group computes at a time"
    )
    for name, row in numbered_runs(layout.stages):
        table.add_row(name, *map(format_size, row.memory.values()), f"{row.sequences:,}", format_size(row.total))
    return table


def report_table(report: Report) -> Table:
    """One row a figure; a figure without a value has no row."""
    table = Table("figure", "value")
    rate = report.tokens / report.wall_s if report.wall_s > 0 else 0.0
    table.add_row("tokens/s", f"{rate:,.1f}  ({report.tokens:,} tokens in {report.wall_s:.2f} s)")
    for name, percentiles in report.latencies.items():
        if percentiles:
            texts = (f"p{percent} {_duration(seconds)}" for percent, seconds in percentiles.items())
            table.add_row(name, ", ".join(texts))
    if report.loaded_bytes:
        longest = max(report.loading_s)
        speed = report.loaded_bytes / max(longest, 1e-9) / 1e9
        size = format_size(report.loaded_bytes)
        table.add_row("weights", f"{size} read in {longest:.2f} s, {speed:.2f} GB/s of all ranks")
    for phase, low, mean, high in phase_shares(report.seconds):
        table.add_row(f"{phase}, share of time", f"{mean:.1%}  (ranks from {low:.1%} to {high:.1%})")
    for phase, slowest in stragglers(report.seconds).items():
        ranks = ", ".join(_rank_text(rank, report.seconds[phase][rank], report.hosts) for rank in slowest)
        table.add_row(f"{phase}, slowest ranks", ranks)
    if report.slow_hosts:
        table.add_row("slow hosts", ", ".join(report.slow_hosts))
    if report.expert_load.size:
        table.add_row("expert imbalance, max/mean", _imbalance_text(report.expert_load))
    if report.asked_load is not None:
        table.add_row("without balancing, max/mean", _imbalance_text(report.asked_load))
        table.add_row("choices moved", f"{report.moved:.1%}")
    if report.replay.get("routes"):
        routes, changed = report.replay["routes"], report.replay.get("changed", 0)
        table.add_row("routes replayed", f"{routes:,}, of which {changed / routes:.1%} differ from the router's own")
    if not math.isnan(report.logprob_change):
        table.add_row("quality cost", f"{report.logprob_change:+.4f} mean log-probability of a token")
    if report.earlier_requests:
        table.add_row("of earlier runs", f"{report.earlier_requests:,} requests, {report.earlier_tokens:,} tokens")
    table.add_row("finished", ", ".join(f"{reason} {count:,}" for reason, count in sorted(report.finishes.items())))
    for number, error in enumerate(report.errors, start=1):
        table.add_row(f"error {number} of {report.num_errors:,}", error)
    if report.scores is not None:
        scores = report.scores
        table.add_row("scores, mean", f"{scores.mean:.4f}  (sum {scores.sum:,.3f} of {scores.num_tokens:,} tokens)")
        table.add_row("perplexity", f"{scores.perplexity:.4g}")
    if report.referenced:
        share = report.exact / report.referenced
        table.add_row("exact matches", f"{report.exact:,} of {report.referenced:,}  ({share:.1%})")
    if report.transport:
        table.add_row("transport", report.transport)
    for name in [name.removesuffix("_bytes") for name in report.sent if name.endswith("_bytes")]:
        size, messages = format_size(report.sent[f"{name}_bytes"]), report.sent[f"{name}_messages"]
        if messages:
            kind, _, level = name.rpartition("_")
            table.add_row(f"{SENT_ROWS[kind]}, {level}", f"{size} in {messages:,} messages")
    table.add_row("results", report.results)
    return table


def outputs_table(outputs: Iterable[OutputRow]) -> Table:
    """One row a request."""
    table = Table("prompt", "answer", "reference", "")
    for output in outputs:
        if output.error:
            table.add_row(output.prompt, output.error, output.reference or "", "error")
            continue
        verdict = "exact" if output.text == output.reference else "differs"
        texts = (output.prompt, output.text, output.reference or "")
        table.add_row(*texts, "" if output.reference is None else verdict)
    return table


def scores_table(scored: Iterable[ScoreRow]) -> Table:
    """One row a request."""
    table = Table("prompt", "tokens", "sum", "mean", "perplexity")
    for row in scored:
        scores = row.scores
        figures = (f"{scores.num_tokens:,}", f"{scores.sum:.3f}", f"{scores.mean:.4f}", f"{scores.perplexity:.4g}")
        table.add_row(row.prompt, *((row.error, "", "", "") if row.error else figures))
    return table


def phase_shares(seconds: Mapping[str, Sequence[float]]) -> list[tuple[str, float, float, float]]:
    """Each phase with the least, mean and greatest share that it takes of a rank's time."""
    totals = [sum(of_rank) for of_rank in zip(*seconds.values(), strict=True)]
    shares = {
        phase: [part / total if total > 0 else 0.0 for part, total in zip(parts, totals, strict=True)]
        for phase, parts in seconds.items()
    }
    return [(phase, min(parts), fmean(parts), max(parts)) for phase, parts in shares.items() if parts]


def stragglers(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    """The NUM_STRAGGLERS ranks with most time in each phase, the slowest first; none for a single rank.

    A phase is left out if it takes no rank more than MIN_SHARE of the longest rank's time.
    """
    if any(len(parts) < 2 for parts in seconds.values()):
        return {}
    wall_s = max((sum(of_rank) for of_rank in zip(*seconds.values(), strict=True)), default=0.0)
    return {
        phase: sorted(range(len(parts)), key=lambda rank: -parts[rank])[:NUM_STRAGGLERS]
        for phase, parts in seconds.items()
        if max(parts) > MIN_SHARE * wall_s
    }


def imbalance(expert_load: NDArray[np.int64]) -> NDArray[np.float64]:
    """Load of the busiest expert divided by the mean load, for each layer (L,); 1 for a layer without tokens."""
    mean = expert_load.mean(axis=1)
    ratio = np.ones(len(mean))
    np.divide(expert_load.max(axis=1), mean, out=ratio, where=mean > 0)
    return ratio


def _imbalance_text(expert_load: NDArray[np.int64]) -> str:
    layers = imbalance(expert_load)
    return f"{layers.mean():.2f}  (worst layer {layers.max():.2f})"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _rank_text(rank: int, seconds: float, hosts: Sequence[str]) -> str:
    host = f" on {hosts[rank]}" if len(set(hosts)) > 1 else ""
    return f"{rank}{host} ({seconds:.2f} s)"
