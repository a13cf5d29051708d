"""`moempi plan --report`: an HTML file with pictures of a forecast, each beside its numbers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

from msgspec import structs

from moempi.errors import ConfigError
from moempi.layout.layout import make_layout
from moempi.layout.topology import virtual
from moempi.observe.html_page import Picture, html_page
from moempi.observe.svg import Axis, Bar, Series, bar_chart, stacked, xy_chart
from moempi.planning.forecast import Forecast, PlannedJob, StageForecast, forecast
from moempi.planning.simulate import Resumed
from moempi.planning.virtual_time import Conditions, run_in_virtual_time
from moempi.storage.files import atomic

RANK_FACTORS = (0.25, 0.5, 1, 2, 4)
SLOW_FACTORS = (1.0, 1.25, 1.5, 2.0, 3.0)
MOST_STEPS = 400
"""Micro-batches of the runs in virtual time, unless more are in flight."""
KINDS = ("compute", "travel", "idle")
COMPUTE, TRAVEL, IDLE = range(3)
MOST_BARS = 16
"""Most bars of stages; equal stages share one."""


@dataclass(frozen=True)
class Point:
    """A layout in the picture of speeds and latencies: a name, seconds of latency, and tokens/s."""

    name: str
    latency_s: float
    tokens_per_s: float


def write_report(out: Path, planned: PlannedJob, pictures: Sequence[Picture]) -> None:
    """Write the page; raises StorageError."""
    notes = [
        "A model's forecast, not a measurement.",
        f"Machine: {planned.machine.name}",
        f"{len(planned.topology.nodes):,} GPUs or ranks on {planned.topology.num_nodes:,} nodes, weights "
        f"{Path(planned.job.model.weights).name}",
    ]
    with atomic(out) as temporary:
        temporary.write_text(html_page("Forecast of a job", notes, pictures), encoding="utf-8")


def pictures_of(planned: PlannedJob, found: Forecast, *, replicas: int = 1) -> Iterator[Picture]:
    """The pictures of one forecast of `replicas` equal jobs."""
    yield _scaling(planned, found, replicas)
    yield _shares(found)
    yield _timeline(planned, found)
    yield _slow_rank(planned, found)


def front_picture(front: Sequence[Point], conventional: Sequence[Point], *, latency: str) -> Picture:
    """Speed against latency of the layouts that a search found, and of layouts in common use."""
    numbers = [str(index + 1) for index in range(len(front) + len(conventional))]
    groups = (("found", front, numbers), ("in common use", conventional, numbers[len(front) :]))
    series = [
        Series(name, [(one.latency_s * 1e3, one.tokens_per_s) for one in points], labels, is_line=name == "found")
        for name, points, labels in groups
        if points
    ]
    rows = [
        (label, one.name, f"{one.latency_s * 1e3:,.1f}", f"{one.tokens_per_s:,.0f}")
        for label, one in zip(numbers, [*front, *conventional], strict=True)
    ]
    title = "Speed against latency (Pareto front)"
    svg = xy_chart(series, Axis(f"{latency} (ms)"), Axis("tokens/s"), title=title)
    caption = "The fastest layout, then each time the fastest whose latency is a fifth less."
    return Picture(title, svg, ("", "layout", f"{latency} (ms)", "tokens/s"), rows, caption)


def _scaling(planned: PlannedJob, found: Forecast, replicas: int) -> Picture:
    """Tokens/s of the same job on fewer and on more ranks."""
    ranks, points, rows = found.num_ranks, [], []
    for factor in RANK_FACTORS:
        if (count := round(ranks * factor)) != ranks * factor:
            continue
        try:
            speed = replicas * _on(planned, found, count).tokens_per_s(overlap=True)
        except ConfigError as error:
            rows.append((f"{replicas * count:,}", "does not fit", "", str(error)))
            continue
        points.append((replicas * count, speed))
        rows.append((f"{replicas * count:,}", f"{speed:,.0f}", f"{speed / replicas / count:,.1f}", ""))
    own = replicas * found.tokens_per_s(overlap=True) / (replicas * ranks)
    ideal = [(count, own * count) for count, _ in points]
    title = f"{found.workload.name.capitalize()}: tokens/s against GPUs"
    series = [Series("this job", points), Series("in proportion", ideal)]
    svg = xy_chart(series, Axis("GPUs", is_log=True), Axis("tokens/s", is_log=True), title=title)
    caption = "The same stages and tensor groups with more or fewer data parallel groups, each with its own sequences."
    return Picture(title, svg, ("GPUs", "tokens/s", "a GPU", "why not"), rows, caption)


def _on(planned: PlannedJob, found: Forecast, ranks: int) -> Forecast:
    """The forecast of the job on another number of ranks; raises ConfigError if it does not fit."""
    if ranks == found.num_ranks:
        return found
    job = structs.replace(planned.job, parallel=structs.replace(planned.job.parallel, stage_ranks=()))
    topology = virtual(ranks, planned.topology.nodes.count(0))
    layout = make_layout(job, planned.architecture, topology.nodes, on_gpu=job.run.backend == "cupy")
    return forecast(replace(planned, job=job, layout=layout, topology=topology), found.workload)


def _equal_stages(found: Forecast) -> list[tuple[str, StageForecast]]:
    """Each set of equal stages, with their numbers."""
    sets: list[tuple[StageForecast, list[int]]] = []
    for number, stage in enumerate(found.stages):
        equal = next((numbers for one, numbers in sets if one == stage), None)
        if equal is None:
            sets.append((stage, [number]))
        else:
            equal.append(number)
    return [(f"stage{'s' if len(numbers) > 1 else ''} {_ranges(numbers)}", stage) for stage, numbers in sets]


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as `0, 2 to 5, 7`."""
    runs = groupby(enumerate(numbers), key=lambda place: place[1] - place[0])
    following = [[number for _, number in run] for _, run in runs]
    return ", ".join(f"{one[0]}" if len(one) == 1 else f"{one[0]} to {one[-1]}" for one in following)


def _shares(found: Forecast) -> Picture:
    """The shares of a step of each stage that are computing, travel that nothing hides, and idle."""
    step_s, shares = found.micro_batch_s(overlap=True), {}
    for name, stage in _equal_stages(found):
        compute_s, stage_s = stage.compute_s, max(stage.overlapped_s, stage.compute_s)
        shares[name] = compute_s / step_s, (stage_s - compute_s) / step_s, max(0.0, 1 - stage_s / step_s)
    rows = [(name, f"{step_s * 1e3:.3f}", *(f"{share:.1%}" for share in three)) for name, three in shares.items()]
    least_idle = sorted(shares, key=lambda name: shares[name][IDLE])[:MOST_BARS]
    bars = [stacked(name, [100 * share for share in shares[name]]) for name in shares if name in least_idle]
    title = f"{found.workload.name.capitalize()}: where the time of a stage goes"
    svg = bar_chart(bars, KINDS, Axis("% of the time between micro-batches"), title=title)
    caption = "Travel: rows on the links that no computing hides. Idle: the stage waits for other stages."
    if len(bars) < len(rows):
        caption += f" Bars of the {len(bars)} least idle of {len(rows)} sets of equal stages; the table has all."
    return Picture(title, svg, ("", "step (ms)", *KINDS), rows, caption)


def _steps(found: Forecast) -> int:
    return max(min(3 * found.in_flight, MOST_STEPS), found.in_flight + 2)


def _timeline(planned: PlannedJob, found: Forecast) -> Picture:
    """The lanes of the slowest stage during two rounds of its steps, after the pipeline has filled."""
    index = max(range(len(found.stages)), key=lambda one: found.stages[one].overlapped_s)
    first, rounds_s = found.in_flight, 2 * found.lanes * found.micro_batch_s(overlap=True)
    seen: list[list[Resumed]] = [[] for _ in range(found.lanes)]

    def observe(stage: int, step: int, resumed: Resumed) -> None:
        if stage == index and step >= first:
            seen[resumed.lane].append(resumed)

    run_in_virtual_time(planned, found, Conditions(), num_steps=first + 5 * found.lanes, observer=observe)
    begin_s = max(lane[1].begin_s for lane in seen)  # all lanes compute a step
    bars = [Bar(f"lane {lane}", _parts(resumed, begin_s, rounds_s)) for lane, resumed in enumerate(seen)]
    rows = [
        (bar.label, *(f"{sum(end - begin for begin, end, kind in bar.parts if kind == one):.3f}" for one in range(3)))
        for bar in bars
    ]
    title = f"{found.workload.name.capitalize()}: timeline of stage {index}, the slowest"
    caption = "Two steps of each lane. Idle: a lane whose rows have arrived waits for the rank, or for another stage."
    heads = ("", *(f"{kind} (ms)" for kind in KINDS))
    return Picture(title, bar_chart(bars, KINDS, Axis("ms"), title=title), heads, rows, caption)


def _parts(resumed: Sequence[Resumed], begin_s: float, length_s: float) -> list[tuple[float, float, int]]:
    """The parts of a lane's bar from `begin_s` on, in milliseconds."""
    parts = [*_computing(resumed[0])]
    for before, one in pairwise(resumed):
        arrived_s = max(one.arrived_s, before.end_s)
        parts.append((before.end_s, arrived_s, IDLE if before.begins else TRAVEL))
        parts += [(arrived_s, one.begin_s, IDLE), *_computing(one)]
    clipped = ((max(begin - begin_s, 0.0), min(end - begin_s, length_s), kind) for begin, end, kind in parts)
    return [(begin * 1e3, end * 1e3, kind) for begin, end, kind in clipped if end > begin]


def _computing(resumed: Resumed) -> Iterator[tuple[float, float, int]]:
    """The parts in which a resumed lane computes, and those between them, in which it gives way to others."""
    for number, (begin_s, end_s) in enumerate(resumed.spans):
        if number:
            yield resumed.spans[number - 1][1], begin_s, IDLE
        yield begin_s, end_s, COMPUTE


def _slow_rank(planned: PlannedJob, found: Forecast) -> Picture:
    """Tokens/s if one rank of the slowest stage computes slower."""
    index = max(range(len(found.stages)), key=lambda one: found.stages[one].compute_s)
    rank = planned.layout.grid.stages[index].ranks.start
    speeds = [
        run_in_virtual_time(
            planned, found, Conditions(slow_ranks={rank: factor}), num_steps=_steps(found)
        ).full_tokens_per_s
        for factor in SLOW_FACTORS
    ]
    shares = [100 * speed / speeds[0] for speed in speeds]
    rows = [(f"{factor:g}", f"{share:.1f} %") for factor, share in zip(SLOW_FACTORS, shares, strict=True)]
    title = f"{found.workload.name.capitalize()}: what one slow rank costs"
    series = [
        Series("this job", list(zip(SLOW_FACTORS, shares, strict=True))),
        Series("1 / factor", [(factor, 100 / factor) for factor in SLOW_FACTORS]),
    ]
    svg = xy_chart(series, Axis("times as slow", begin=1.0), Axis("% of the tokens/s"), title=title)
    caption = f"Rank {rank} of stage {index} computes slower by a factor; all stages in virtual time, pipeline full."
    return Picture(title, svg, ("factor", "of the tokens/s"), rows, caption)
