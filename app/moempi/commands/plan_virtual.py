"""`moempi plan --routing, --slow-rank, --slow-link`: a run in virtual time, whose ranks and routing are not even."""

import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from moempi.arrays import IntArray
from moempi.commands.flags import MAX_RANKS, amount, whole_number
from moempi.config.architecture import Architecture
from moempi.errors import ConfigError, DataError, UsageError
from moempi.observe.console import figures_table
from moempi.planning.forecast import Forecast, PlannedJob
from moempi.planning.routing import DrawnRouting, RecordedRouting, Routing
from moempi.planning.virtual_time import Conditions, run_in_virtual_time
from moempi.storage.routing import RoutingFile

DEFAULT_STEPS = 1000
MAX_STEPS = 100_000
MAX_FACTOR = 1e6
MAX_EXPONENT = 10.0
RECORDED_TOKENS = 200_000
"""Recorded tokens of each layer that are used."""


def add_virtual_flags(parser: ArgumentParser) -> None:
    """What is uneven or slow, and the length of the run in virtual time."""
    routing = "a run in virtual time: how tokens choose experts"
    parser.add_argument("--routing", metavar="uniform|zipf:S|RESULTS.h5", help=routing)
    for name, what in (("--slow-rank", "computes"), ("--slow-link", "sends and receives")):
        slow = f"a run in virtual time: this rank {what} FACTOR times slower"
        parser.add_argument(name, type=_slow, action="append", default=[], metavar="RANK=FACTOR", help=slow)
    steps = "micro-batches of the run in virtual time (1000)"
    parser.add_argument("--steps", type=whole_number(1, MAX_STEPS), metavar="N", help=steps)


def require_virtual_flags(chosen: Namespace) -> None:
    """Raise UsageError if a flag does not go with the others."""
    given = [f"--{name.replace('_', '-')}" for name in _NAMES if getattr(chosen, name)]
    if given and chosen.search:
        raise UsageError(f"{given[0]} does not go with --search; write the job with -o, then plan it")


_NAMES = ("routing", "slow_rank", "slow_link", "steps")


def is_requested(chosen: Namespace) -> bool:
    """Whether the flags ask for a run in virtual time."""
    return any(getattr(chosen, name) for name in _NAMES)


def virtual_table(chosen: Namespace, planned: PlannedJob, forecasts: Sequence[Forecast]) -> Table:
    """Runs without and with each of the conditions that the flags state, and with all of them.

    Raises UsageError for a flag's text, ConfigError for other ranks or another model than the job's, NoInputError and
    DataError for the file of recorded routing.
    """
    cases, num_steps = list(_cases(chosen, planned.architecture)), chosen.steps or DEFAULT_STEPS
    table = figures_table("step", "virtual time", "token/s", "of even", "when full", "fill s", "all s")
    begin_s = time.process_time()
    for found in forecasts:
        even_s = 0.0
        for name, conditions in cases:
            run = run_in_virtual_time(planned, found, conditions, num_steps=num_steps)
            even_s = even_s or float(run.ends_s[-1])
            speeds = f"{run.tokens_per_s:,.0f}", f"{even_s / run.ends_s[-1]:.1%}", f"{run.full_tokens_per_s:,.0f}"
            table.add_row(found.workload.name, name, *speeds, f"{run.fill_s:.3f}", f"{run.ends_s[-1]:.2f}")
    table.caption = (
        f"{num_steps:,} micro-batches from an empty pipeline to the last token, simulated in "
        f"{time.process_time() - begin_s:.0f} s of a core; when full: after the first round"
    )
    return table


def _cases(chosen: Namespace, architecture: Architecture) -> Iterator[tuple[str, Conditions]]:
    """Names and conditions of the runs, from an even one to one with all conditions."""
    yield "even", Conditions()
    routing = _routing(chosen.routing, architecture) if chosen.routing else None
    slow_ranks, slow_links = (_by_rank(name, getattr(chosen, name)) for name in ("slow_rank", "slow_link"))
    single = []
    if routing:
        single.append((Path(chosen.routing).name[:20], Conditions(routing)))
    if slow_ranks:
        single.append((_name("slow rank", slow_ranks), Conditions(slow_ranks=slow_ranks)))
    if slow_links:
        single.append((_name("slow link", slow_links), Conditions(slow_links=slow_links)))
    yield from single
    if len(single) > 1:
        yield "all of these", Conditions(routing, slow_ranks, slow_links)


def _name(kind: str, factors: dict[int, float]) -> str:
    (rank, factor), *others = factors.items()
    return f"{len(factors)} {kind}s" if others else f"{kind} {rank}={factor:g}"


def _slow(text: str) -> tuple[int, float]:
    """A flag's value RANK=FACTOR; raises ArgumentTypeError for any other text."""
    rank, _, factor = text.partition("=")
    if not 1 <= (found := amount(factor)) <= MAX_FACTOR:
        raise ArgumentTypeError(f"{factor[:20]} is not a factor from 1 to {MAX_FACTOR:g}")
    return whole_number(0, MAX_RANKS)(rank), found


def _by_rank(name: str, pairs: Sequence[tuple[int, float]]) -> dict[int, float]:
    factors = dict(pairs)
    if len(factors) < len(pairs):
        raise UsageError(f"--{name.replace('_', '-')} names a rank twice")
    return factors


def _routing(text: str, architecture: Architecture) -> Routing:
    """The routing that a flag names."""
    experts = architecture.experts
    kind, _, exponent = text.partition(":")
    if text == "uniform":
        return DrawnRouting(experts.num, experts.router.top_k, exponent=0.0)
    if kind == "zipf":
        try:
            number = amount(exponent)
        except ArgumentTypeError as error:
            raise UsageError(f"--routing {text[:30]}: {error}") from error
        if number > MAX_EXPONENT:
            raise UsageError(f"--routing {text[:30]}: the exponent is at most {MAX_EXPONENT:g}")
        return DrawnRouting(experts.num, experts.router.top_k, exponent=number)
    with RoutingFile(text) as file:
        recorded = (file.num_experts, file.top_k, file.layers)
        if recorded != (experts.num, experts.router.top_k, architecture.moe_layers):
            raise ConfigError(
                f"{text}: is of a model with {file.num_experts} experts, top-{file.top_k}, in {len(file.layers)} "
                f"layers; the job's has {experts.num}, top-{experts.router.top_k}, in "
                f"{len(architecture.moe_layers)}, or others"
            )
    return RecordedRouting(lambda layer: _recorded_experts(text, layer), experts.num)


def _recorded_experts(path: str, layer: int) -> IntArray:
    """The experts of the recorded tokens of a layer (T, K), in the order of their steps if the file has them."""
    with RoutingFile(path) as file:
        found = file.layer(file.layers.index(layer), last=RECORDED_TOKENS)
    experts: IntArray = found["experts"]
    if not len(experts):
        raise DataError(f"{path}: routing of layer {layer}: has no tokens")
    return experts[np.argsort(found["step"], kind="stable")] if "step" in found else experts
