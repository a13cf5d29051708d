"""Measuring a GPU by its own clock: CUDA events around calls that were all submitted before the first of them began.

A kernel that only spins blocks the stream while the host submits. So the time between the events contains no waiting
for the host, which is measured separately.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any, Protocol

Run = Callable[[], object]
MEASUREMENT_S = 8e-3
"""About the seconds of one measurement, which decide the number of its calls."""
LONGEST_SPIN_S = 0.2


class Timer(Protocol):
    """The clock of a GPU and its current stream."""

    @property
    def stream(self) -> int:
        """The address of the current stream, for libraries that submit to it."""

    def spin(self, seconds: float) -> None:
        """Submit work that takes at least `seconds`."""

    def record_event(self) -> Any:
        """Record an event with a time behind all work in the current stream."""

    def is_done(self, event: Any) -> bool:
        """Whether the GPU has reached the event; does not block."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two events that the GPU has reached."""

    def synchronize(self) -> None:
        """Block until all streams are idle."""

    def free_memory(self) -> None:
        """Return unused memory to the driver; blocks."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one call: on the GPU, and of the host to submit it.

    `host_bound` if the GPU waited for the host in some measurement, also with the longest spin. `problem` is the error
    of a contestant that failed, else "".
    """

    gpu_s: float = 0.0
    host_s: float = 0.0
    repeats: int = 0
    host_bound: bool = False
    problem: str = ""


@dataclass(slots=True)
class _Series:
    """The measurements of one contestant."""

    run: Run
    repeats: int = 1
    spin_s: float = 2e-3
    host_bound: bool = False
    gpu_s: list[float] = field(default_factory=list)
    host_s: list[float] = field(default_factory=list)
    problem: str = ""

    def timing(self) -> Timing:
        if self.problem:
            return Timing(problem=self.problem)
        return Timing(median(self.gpu_s), median(self.host_s), self.repeats, self.host_bound)


class EventClock:
    """Times contestants alternately in `rounds` rounds, each up to `most_repeats` times in a row."""

    def __init__(self, timer: Timer, *, rounds: int, most_repeats: int) -> None:
        self.timer = timer
        self._rounds = rounds
        self._most_repeats = most_repeats

    def compare(self, contestants: Mapping[str, Run]) -> dict[str, Timing]:
        """The timing of each contestant; one that raises is not called again. Blocks."""
        series = {name: _Series(run) for name, run in contestants.items()}
        gc.disable()
        try:
            for action in (self._prepare, *[self._measure] * self._rounds):
                for one in series.values():
                    if not one.problem:
                        _attempt(action, one)
        finally:
            gc.enable()
        return {name: one.timing() for name, one in series.items()}

    def wall(self, contestants: Mapping[str, Run], *, repeats: int) -> dict[str, list[float] | str]:
        """Seconds of a call by the host's clock, from idle to idle, in each round; or the error. Blocks."""
        taken: dict[str, list[float] | str] = {name: [] for name in contestants}
        for _ in range(self._rounds + 1):
            for name, run in contestants.items():
                times = taken[name]
                if isinstance(times, list):
                    try:
                        times.append(self._wall_s(run, repeats))
                    except Exception as error:
                        taken[name] = describe(error)
        return {name: times if isinstance(times, str) else times[1:] for name, times in taken.items()}

    def _wall_s(self, run: Run, repeats: int) -> float:
        self.timer.synchronize()
        begin = perf_counter()
        for _ in range(repeats):
            run()
        self.timer.synchronize()
        return (perf_counter() - begin) / repeats

    def _prepare(self, series: _Series) -> None:
        """Warm up, which compiles and allocates, and choose the number of calls of a measurement."""
        series.run()
        series.run()
        gpu_s, host_s, _ = self._once(series)
        wanted = int(MEASUREMENT_S / max(gpu_s, host_s, 1e-9))
        series.repeats = min(max(wanted, 1), self._most_repeats)
        series.spin_s = 1e-3 + 1.5 * host_s * series.repeats

    def _measure(self, series: _Series) -> None:
        """Measure once; with a longer spin or fewer calls as long as the GPU waits for the host."""
        gpu_s, host_s, hidden = self._once(series)
        while not hidden and (series.spin_s < LONGEST_SPIN_S or series.repeats > 1):
            if series.spin_s < LONGEST_SPIN_S:
                series.spin_s = min(LONGEST_SPIN_S, 1e-3 + 2 * max(series.spin_s, host_s * series.repeats))
            else:
                series.repeats = max(1, series.repeats // 4)
            gpu_s, host_s, hidden = self._once(series)
        series.host_bound |= not hidden
        series.gpu_s.append(gpu_s)
        series.host_s.append(host_s)

    def _once(self, series: _Series) -> tuple[float, float, bool]:
        """Seconds of a call on the GPU and on the host, and whether all were submitted before the first began."""
        timer = self.timer
        timer.synchronize()
        timer.spin(series.spin_s)
        begin = timer.record_event()
        submitting = perf_counter()
        for _ in range(series.repeats):
            series.run()
        host_s = (perf_counter() - submitting) / series.repeats
        hidden = not timer.is_done(begin)
        end = timer.record_event()
        timer.synchronize()
        return timer.seconds(begin, end) / series.repeats, host_s, hidden


def _attempt(action: Callable[[_Series], None], series: _Series) -> None:
    try:
        action(series)
    except Exception as error:
        series.problem = describe(error)


def describe(error: Exception) -> str:
    """One line for an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0]}"
