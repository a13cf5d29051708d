"""The cases that `moempi bench gpu` measures, and their figures as a table and as JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.table import Table

from moempi.backend.cuda.backend import CudaBackend
from moempi.bench.device_calls import record_calls, replay
from moempi.bench.gpu_clock import EventClock, Run, Timing, describe
from moempi.bench.random_values import RandomValues
from moempi.bench.torch_peers import TorchPeers
from moempi.comm.transfers import PendingTransfers
from moempi.observe.console import figures_table

OURS, COPY, KERNELS = "moempi", "copy", "its kernels alone"
TOLERANCE = 0.05
"""Largest difference of bfloat16 results, per largest value of a row, that is not reported."""


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cases are measured with; the backend advances the `pending` transfers while the host waits."""

    backend: CudaBackend
    clock: EventClock
    values: RandomValues
    peers: TorchPeers
    pending: PendingTransfers


@dataclass(frozen=True, slots=True)
class Case:
    """Contestants that do the same work; moempi's is OURS.

    `amount` is the work, in bytes if `unit` is "GB/s", in floating point operations if "TFLOP/s"; `amounts` are those
    of contestants that do less or more, such as COPY. The outputs of the contestants in `same` are compared with
    moempi's. All times are divided by `units`.

    With `wall_repeats`, calls are also timed by the host's clock, that many in a row. If moempi's call `blocks` the
    host, it has only this time, and KERNELS is the time of its kernels, submitted again without the host's other work;
    `remark` makes a note of their number.
    """

    part: str
    work: str
    amount: float
    unit: str
    contestants: Mapping[str, Run]
    amounts: Mapping[str, float] = field(default_factory=dict)
    same: Sequence[str] = ()
    units: int = 1
    wall_repeats: int = 0
    blocks: bool = False
    remark: Callable[[int], str] | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """The figures of one contestant of a case: microseconds of a call, its rate, and comparisons.

    `times_ours` is its time per moempi's time; `of_copy` its rate per the rate of the device's copy. None: none.
    """

    part: str
    work: str
    contestant: str
    gpu_us: float | None = None
    host_us: float | None = None
    wall_us: float | None = None
    rate: float | None = None
    unit: str = ""
    of_copy: float | None = None
    times_ours: float | None = None
    note: str = ""


def measure_case(bench: Bench, part: str, make: Callable[[], Case], *, copy_rate: float | None) -> list[Figure]:
    """The figures of the case that `make` returns, one for each contestant; an error is a figure's note. Blocks."""
    try:
        case = make()
        return _measured(bench, case, copy_rate)
    except Exception as error:
        return [Figure(part, "", OURS, note=describe(error))]


def _measured(bench: Bench, case: Case, copy_rate: float | None) -> list[Figure]:
    contestants, on_gpu, remarks = dict(case.contestants), dict(case.contestants), {}
    if case.blocks:
        calls = record_calls(bench.backend, on_gpu.pop(OURS))
        contestants[KERNELS] = on_gpu[KERNELS] = lambda: replay(calls)
        if case.remark is not None:
            remarks[OURS] = case.remark(len(calls))
    timings = bench.clock.compare(on_gpu)
    walls = bench.clock.wall(case.contestants, repeats=case.wall_repeats) if case.wall_repeats else {}
    if COPY in timings and not timings[COPY].problem:
        copy_rate = case.amounts[COPY] / timings[COPY].gpu_s / 1e9
    ours = _ours_s(timings, walls)
    figures = [
        _figure(case, name, timings.get(name), walls.get(name), copy_rate=copy_rate, ours=ours) for name in contestants
    ]
    remarks |= _fastest_peer(figures)
    return [_with_note(_compared(bench, case, figure), remarks.get(figure.contestant, "")) for figure in figures]


def _fastest_peer(figures: Sequence[Figure]) -> dict[str, str]:
    """A remark on the fastest of several other implementations."""
    peers = {figure.contestant: figure.times_ours for figure in figures if figure.contestant.startswith("torch ")}
    taken = {name: times for name, times in peers.items() if times is not None}
    return {min(taken, key=lambda name: taken[name]): "the fastest of torch"} if len(peers) > 1 and taken else {}


def _ours_s(timings: Mapping[str, Timing], walls: Mapping[str, list[float] | str]) -> float | None:
    """Moempi's seconds: by the host's clock if that was used, else by the GPU's."""
    wall, timing = walls.get(OURS), timings.get(OURS)
    if wall is not None:
        return None if isinstance(wall, str) else median(wall)
    return timing.gpu_s if timing is not None and not timing.problem else None


def _figure(
    case: Case,
    name: str,
    timing: Timing | None,
    wall: list[float] | str | None,
    *,
    copy_rate: float | None,
    ours: float | None,
) -> Figure:
    problem = wall if isinstance(wall, str) else timing.problem if timing else ""
    if problem:
        return Figure(case.part, case.work, name, note=problem)
    wall_s = median(wall) if isinstance(wall, list) else None
    seconds = wall_s if wall_s is not None else timing.gpu_s if timing else 0.0
    amount, us = case.amounts.get(name, case.amount), 1e6 / case.units
    rate = amount / seconds / (1e12 if case.unit == "TFLOP/s" else 1e9) if amount else None
    return Figure(
        case.part,
        case.work,
        name,
        gpu_us=timing.gpu_s * us if timing else None,
        host_us=timing.host_s * us if timing else None,
        wall_us=wall_s * us if wall_s is not None else None,
        rate=rate,
        unit=case.unit if rate is not None else "",
        of_copy=rate / copy_rate if rate is not None and copy_rate and case.unit == "GB/s" else None,
        times_ours=seconds / ours if ours else None,
        note="the GPU waited for the host" if timing and timing.host_bound else "",
    )


def _compared(bench: Bench, case: Case, figure: Figure) -> Figure:
    """The figure with a note if its output is not moempi's."""
    if figure.contestant not in case.same or figure.note.startswith("failed"):
        return figure
    try:
        ours, theirs = (case.contestants[name]() for name in (OURS, figure.contestant))
        bench.clock.timer.synchronize()
        difference = bench.peers.difference(ours, theirs)
        same = f"same within {difference:.1%}" if difference <= TOLERANCE else f"DIFFERENT by {difference:.1%}"
    except Exception as error:
        same = f"not compared: {describe(error)}"
    return _with_note(figure, same)


def _with_note(figure: Figure, note: str) -> Figure:
    return replace(figure, note="; ".join(text for text in (figure.note, note) if text))


def table(title: str, caption: str) -> Table:
    """An empty table of figures."""
    heads = ("part", "work", "contestant", "GPU us", "host us", "wall us", "rate", "of copy", "/ moempi", "note")
    return figures_table(*heads, title=title, caption=caption)


def cells(figure: Figure) -> list[str]:
    """The figure as cells of `table`."""
    rate = "" if figure.rate is None else f"{figure.rate:,.1f} {figure.unit}"
    times = [_number(value, "{:,.1f}") for value in (figure.gpu_us, figure.host_us, figure.wall_us)]
    ratios = [_number(value, "{:.2f}") for value in (figure.of_copy, figure.times_ours)]
    return [figure.part, figure.work, figure.contestant, *times, rate, *ratios, figure.note]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def write_json(path: Path, figures: Sequence[Any]) -> None:
    """Write all figures, dataclasses or mappings, as one list; replaces the file."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(list(figures)), indent=1) + b"\n")
