"""`moempi plan --search`: the best layout of a job on a machine, beside others, and a job file with it."""

import random
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import inf
from pathlib import Path

from msgspec import structs
from rich.table import Table

from moempi.commands.flags import add_force_flag, amount, count
from moempi.commands.plan_report import Point, front_picture, pictures_of, write_report
from moempi.config.job import Job, input_files
from moempi.config.size import format_size
from moempi.config.writing import job_text
from moempi.errors import ConfigError, UsageError
from moempi.observe.console import console, error_console, figures_table
from moempi.planning.candidates import (
    SearchRequest,
    Shape,
    all_shapes,
    candidates,
    conventional_shapes,
    lay_out,
    least_memory,
)
from moempi.planning.forecast import rank_memory
from moempi.planning.search import Cost, Found, Limits, Search, first_token_s, next_token_s
from moempi.planning.workload import Workload, decode, mixed, prefill, score
from moempi.printing import print_line
from moempi.storage.files import atomic, check_output

OUTPUT_TOKENS = 1024
SEARCH_S = 600.0
MANY_SHAPES = 1000
"""More shapes are tried in random order, of which a limited search tries the first."""
MOST_ROWS = 8
"""Rows of the Pareto front."""
LETTERS = "N x: jobs; PP: stages; DP: groups of a stage; TP: ranks of a group; *: uneven; H: head of a stage"
FLAGS: dict[Cost, tuple[str, float]] = {next_token_s: ("--token-ms", 1e3), first_token_s: ("--first-token-s", 1.0)}
"""The flag of each limit, and its units in a second."""


def add_search_flags(parser: ArgumentParser) -> None:
    """Whether to search, for what, within which limits, and where to write the job."""
    parser.add_argument("--search", action="store_true", help="find the best layout on these ranks")
    goal = "with --search: what is to be fast (decode, or prefill if the job scores)"
    parser.add_argument("--for", dest="goal", choices=["prefill", "decode", "mixed"], help=goal)
    output = "with --for mixed: tokens generated after a prompt (1024)"
    parser.add_argument("--output-tokens", type=count, metavar="N", help=output)
    next_token = "with --search: most time from a sequence's token to its next"
    parser.add_argument("--token-ms", type=amount, metavar="MS", help=next_token)
    first_token = "with --search: most time from the start of a prompt to the token after it"
    parser.add_argument("--first-token-s", type=amount, metavar="S", help=first_token)
    seconds = "with --search: time limit (600)"
    parser.add_argument("--search-s", type=amount, metavar="S", help=seconds)
    parser.add_argument("-o", "--out", type=Path, metavar="BEST.toml", help="with --search: write the job found")
    add_force_flag(parser)


def require_search_flags(chosen: Namespace) -> None:
    """Raise UsageError if a flag does not go with the others."""
    flags = {
        "--for": chosen.goal,
        "--token-ms": chosen.token_ms,
        "--first-token-s": chosen.first_token_s,
        "--search-s": chosen.search_s,
        "-o": chosen.out,
        "--output-tokens": chosen.output_tokens,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if given and not chosen.search:
        raise UsageError(f"{given[0]} goes with --search")
    if chosen.output_tokens is not None and chosen.goal != "mixed":
        raise UsageError("--output-tokens goes with --for mixed")


def workload_of(chosen: Namespace, job: Job) -> Workload:
    """What the job of a search computes."""
    goal = chosen.goal or ("decode" if job.task == "generate" else "prefill")
    if job.task == "score" and goal != "prefill":
        raise UsageError(f"--for {goal}: the job scores and generates nothing; use prefill")
    if goal == "mixed":
        return mixed(chosen.prompt, chosen.output_tokens or OUTPUT_TOKENS)
    if goal == "decode":
        return decode(chosen.context)
    return prefill(chosen.prompt) if job.task == "generate" else score(chosen.prompt)


def run_search(chosen: Namespace, request: SearchRequest) -> int:
    """Search, print the layouts, and write the job file.

    Raises ConfigError, with by how much, if no layout fits into the memory of a rank or none keeps the limits.
    """
    limits = _limits(chosen, request.workload)
    if chosen.out:
        check_output(chosen.out, inputs=[chosen.job, chosen.machine, *input_files(request.job)], force=chosen.force)
    _require_searchable(request)
    with error_console().status("") as status:
        watch = _Watch(SEARCH_S if chosen.search_s is None else chosen.search_s, status.update)
        shapes = watch.shapes([*all_shapes(request)])
        search = Search(candidates(request, shapes), request.workload, stops=watch.is_over)
        front = _undominated(list(islice(search.front(limits), MOST_ROWS)))
        if not front:
            raise ConfigError(watch.stop_line() or _refusal(request, search, limits))
        best, runner_up = front[0], search.fastest(limits, without=front[0].shape)
    if runner_up is not None and runner_up.tokens_per_s > best.tokens_per_s:  # by no more than the search may miss
        best, runner_up = runner_up, best
        front = [best, *(found for found in front if found.latency_s < best.latency_s)]
    explained = [_parts_table(filter(None, (best, runner_up)))] if chosen.explain else []
    margin = _margin_line(best, runner_up) if runner_up or not watch.stop_line() else ""
    lines = filter(None, [*_replicas_lines(best), margin, _size_line(search, watch), watch.stop_line()])
    note = f"A model's forecasts, not measurements, of: {request.machine.name}"
    conventional = _conventional(request, limits)
    tables = [_front_table(request, front), *explained, _conventional_table(request, conventional, best)]
    console().print(*tables, LETTERS, *lines, note, sep="\n")
    if chosen.out:
        _write_job(best, chosen.out, machine=request.machine.name)
        print_line(f"wrote {chosen.out}: a job of {len(best.planned.topology.nodes):,} ranks")
    if chosen.report:
        _report(chosen.report, request, front, conventional.values())
    return 0


class _Watch:
    """The time limit of a search, and its progress, a text for `show`."""

    def __init__(self, limit_s: float, show: Callable[[str], None]) -> None:
        self._limit_s = limit_s
        self._show = show
        self._begin_s, self._core_begin_s = time.monotonic(), time.process_time()
        self._untried = self._all = 0
        self._was_over = False

    @property
    def seconds(self) -> float:
        """Seconds since the begin."""
        return time.monotonic() - self._begin_s

    @property
    def core_s(self) -> float:
        """Seconds of computing since the begin."""
        return time.process_time() - self._core_begin_s

    def shapes(self, shapes: Sequence[Shape]) -> Iterator[Shape]:
        """The shapes until half of the time is over, many of them in random order: a sample of all."""
        self._all = len(shapes)
        tried = random.Random(0).sample(shapes, len(shapes)) if len(shapes) > MANY_SHAPES else shapes
        for done, shape in enumerate(tried):
            if self.seconds >= self._limit_s / 2:
                self._untried = len(shapes) - done
                return
            self._show(f"searching: {done:,} of {len(shapes):,} shapes laid out, {self.seconds:.0f} s")
            yield shape

    def is_over(self) -> bool:
        """Whether the time is over; shows the progress."""
        self._show(f"searching: {self._all - self._untried:,} shapes laid out, simulating, {self.seconds:.0f} s")
        self._was_over = self._was_over or self.seconds >= self._limit_s
        return self._was_over

    def stop_line(self) -> str:
        """What was left out for the limit, "" if nothing was."""
        if not self._untried and not self._was_over:
            return ""
        untried = f"{self._untried:,} of {self._all:,} shapes" if self._untried else "some layouts"
        return f"The search ended at its limit, --search-s {self._limit_s:g}: {untried} were not tried."


def _undominated(front: Sequence[Found]) -> list[Found]:
    """The layouts that are faster than all behind them, whose latency is shorter: a search may find them late."""
    kept: list[Found] = []
    for found in reversed(front):
        if not kept or found.tokens_per_s > kept[0].tokens_per_s:
            kept.insert(0, found)
    return kept


def _limits(chosen: Namespace, workload: Workload) -> Limits:
    limits: dict[Cost, float] = {}
    for cost, value, goes in (
        (next_token_s, chosen.token_ms, workload.output),
        (first_token_s, chosen.first_token_s, workload.prompt),
    ):
        flag, unit = FLAGS[cost]
        if value is not None and not goes:
            raise UsageError(f"{flag} does not go with --for {workload.name}")
        if value is not None:
            limits[cost] = value / unit
    return limits


def _write_job(found: Found, out: Path, *, machine: str) -> None:
    """Write the job file of a layout, with the forecast as a comment."""
    ranks = len(found.planned.topology.nodes)
    lines = [
        "# Written by moempi plan --search. A model's forecast, not a measurement:",
        f"# {found.forecast.workload.name} at {found.tokens_per_s:,.0f} tokens/s on {machine!a}",
        f"# {found.shape.replicas} x this job on {ranks} ranks, {found.planned.topology.nodes.count(0)} on a node",
    ]
    with atomic(out) as temporary:
        temporary.write_text("\n".join([*lines, job_text(found.planned.job, out.parent)]), encoding="utf-8")


def _require_searchable(request: SearchRequest) -> None:
    if rank_memory(request.job, request.machine) == inf:
        raise ConfigError(
            "--search needs the memory of a rank: state topology.rank_memory, or memory_gb of the machine"
        )
    if request.job.placement.file:
        raise ConfigError(
            "placement.file places experts for one layout: search without it (--set placement.file=''), then place "
            "for the layout that was found"
        )
    lay_out(request, Shape(1, 1, 1))  # raises what no other layout can mend


def _refusal(request: SearchRequest, search: Search, limits: Limits) -> str:
    """Why there is no layout, and by how much."""
    if not search.layouts:
        return _misfit(request)
    for cost, limit in limits.items():
        flag, unit = FLAGS[cost]
        soonest, least = search.soonest(cost)
        if soonest and least > limit:
            return f"no layout keeps {flag} {limit * unit:g}: the soonest needs {least * unit:.4g}, {_name(soonest)}"
    return f"no layout keeps {' and '.join(FLAGS[cost][0] for cost in limits)} at once, though each limit alone"


def _misfit(request: SearchRequest) -> str:
    """By how much no layout fits into the memory."""
    needed, has = least_memory(request, all_shapes(request)), rank_memory(request.job, request.machine)
    ranks = f"{len(request.topology.nodes):,} ranks"
    return f"no layout fits: the smallest needs {format_size(needed)} on each of {ranks}, which has {format_size(has)}"


def _conventional(request: SearchRequest, limits: Limits) -> dict[str, Found | str]:
    """The best layout of each kind in common use, or why there is none."""
    parallel = structs.replace(request.job.parallel, experts_per_rank=0)
    unlimited = replace(request, job=structs.replace(request.job, parallel=parallel))
    best: dict[str, Found | str] = {}
    for name, shapes in conventional_shapes(unlimited).items():
        search = Search(candidates(unlimited, shapes), request.workload)
        best[name] = search.fastest(limits) or ("beyond the limits" if search.layouts else "does not fit")
    return best


def _conventional_table(request: SearchRequest, conventional: Mapping[str, Found | str], best: Found) -> Table:
    table = figures_table("conventional", "layout", *_latencies(request), "token/s", "of best")
    table.caption = "each the best of its kind, with any number of experts on a rank"
    for name, found in conventional.items():
        if isinstance(found, str):
            table.add_row(name, found)
        else:
            share = found.tokens_per_s / best.tokens_per_s
            table.add_row(name, _name(found), *_latency_cells(found), f"{found.tokens_per_s:,.0f}", f"{share:.1%}")
    return table


def _report(out: Path, request: SearchRequest, front: Sequence[Found], conventional: Iterable[Found | str]) -> None:
    """Write the pictures of the front and of its first layout."""
    latency = "time from a token to the next" if request.workload.output else "time to the first token"
    points = [
        [Point(_name(found), found.latency_s, found.tokens_per_s) for found in layouts if not isinstance(found, str)]
        for layouts in (front, conventional)
    ]
    best = front[0]
    pictures = pictures_of(best.planned, best.forecast, replicas=best.shape.replicas)
    write_report(out, best.planned, [front_picture(*points, latency=latency), *pictures])
    print_line(f"wrote {out}")


def _parts_table(compared: Iterable[Found]) -> Table:
    """The parts of a step of the slowest stage of each layout."""
    table = figures_table("slowest stage", "tokens", "step ms", "arith.", "memory", "link", "host", "idle")
    table.caption = "tokens of a step on all ranks, ms from step to step, and ms of its parts alone"
    for found in compared:
        slowest = max(found.forecast.stages, key=lambda stage: stage.overlapped_s)
        step_s = found.forecast.micro_batch_s(overlap=True)
        parts = (step_s, slowest.arithmetic_s, slowest.memory_s, slowest.link_s, slowest.host_s)
        tokens = found.shape.replicas * found.forecast.tokens
        idle = f"{1 - slowest.busy_s / step_s:.1%}"
        table.add_row(_name(found), f"{tokens:,.0f}", *(f"{part * 1e3:.3f}" for part in parts), idle)
    return table


def _margin_line(best: Found, runner_up: Found | None) -> str:
    if runner_up is None:
        return "No layout of another shape fits, within the limits."
    gain = best.tokens_per_s / runner_up.tokens_per_s - 1
    return f"{_name(best)} is {gain:.1%} faster than the best of another shape, {_name(runner_up)}."


def _size_line(search: Search, watch: "_Watch") -> str:
    return (
        f"{len(search.layouts):,} layouts fit, with {search.num_candidates:,} kinds of steps; "
        f"{search.num_simulated:,} were simulated, in {watch.core_s:.0f} s of a core."
    )


def _replicas_lines(best: Found) -> list[str]:
    if best.shape.replicas == 1:
        return []
    ranks = len(best.planned.topology.nodes)
    return [f"{best.shape.replicas} independent jobs of {ranks:,} ranks share the prompts: see jobs/array.sbatch."]


def _front_table(request: SearchRequest, front: Iterable[Found]) -> Table:
    workload = request.workload
    size = "" if workload.prompt and workload.output else "sequences" if workload.output else "rows"
    heads = ("token/s", *_latencies(request), "layout", "hops", "lanes", "batches", *([size] if size else []))
    table = figures_table(*heads, title=f"{workload.name.capitalize()} on {len(request.topology.nodes):,} ranks")
    table.caption = "the fastest, then each time the fastest whose latency is a fifth less"
    for found in front:
        job = found.planned.job
        hops = "1 imm." if job.exchange.immediate else f"{job.exchange.hops}"
        cells = [hops, f"{job.run.lanes}", f"{job.run.micro_batches}"]
        counts = {"sequences": found.shape.replicas * found.forecast.sequences, "rows": job.run.batch_tokens}
        cells += [f"{counts[size]:,.0f}"] if size else []
        table.add_row(f"{found.tokens_per_s:,.0f}", *_latency_cells(found), _name(found), *cells)
    return table


def _latencies(request: SearchRequest) -> list[str]:
    workload = request.workload
    return [*(["ms a token"] if workload.output else []), *(["first s"] if workload.prompt else [])]


def _latency_cells(found: Found) -> list[str]:
    workload, seconds = found.forecast.workload, found.forecast.seconds(overlap=True)
    next_s = [f"{seconds * 1e3:.1f}"] if workload.output else []
    return [*next_s, *([f"{found.forecast.first_token_s:.2f}"] if workload.prompt else [])]


def _name(found: Found) -> str:
    """The layout in the field's letters, with * if layers or ranks of its stages are other than by default.

    H if all ranks of the last stage divide the LM head.
    """
    replicas, stages, tensor = found.shape
    parallel, grid = found.planned.job.parallel, found.planned.layout.grid
    uneven = "*" * bool(parallel.stage_layers or parallel.stage_ranks)
    name = f"PP{stages} DP{grid.num_groups(0)} TP{tensor}{uneven}"
    return ("" if replicas == 1 else f"{replicas} x ") + name + " H" * (grid.head_ranks > tensor)
