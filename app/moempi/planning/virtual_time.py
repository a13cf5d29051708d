"""A run of a job in virtual time, with fill and drain of its pipeline, uneven routing, slow ranks and slow links. Pure.

A slow rank computes, and a slow link carries, all of its own by a factor longer; the ranks of its stage wait for it at
every exchange.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moempi.arrays import Float64Array
from moempi.errors import ConfigError
from moempi.layout.grid import Stage
from moempi.planning.forecast import Forecast, PlannedJob, StageStep
from moempi.planning.pipeline import Observer, step_ends_s
from moempi.planning.routing import Routing, routed_rows
from moempi.planning.simulate import Phase, PhasesOf, Transmission, equal_steps
from moempi.planning.step_cost import RoutedRows

MOST_NUMBERS = 2048
"""Steps for which a stage's phases are computed at once, times its ranks."""


@dataclass(frozen=True)
class Conditions:
    """What differs from a forecast: routing (None: even), and the factors of slow ranks and of slow links by rank."""

    routing: Routing | None = None
    slow_ranks: Mapping[int, float] = field(default_factory=dict)
    slow_links: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class VirtualRun:
    """A run of micro-batches of `tokens` tokens, whose steps have ended at `ends_s` (n,) after its begin."""

    tokens: float
    in_flight: int
    ends_s: Float64Array

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of the whole run, with filling and draining."""
        return float(self.tokens * len(self.ends_s) / self.ends_s[-1])

    @property
    def full_tokens_per_s(self) -> float:
        """Tokens per second after the first round of all micro-batches in flight; of the whole run if there is one."""
        first, last = self.in_flight, len(self.ends_s) - 1
        if last <= first:
            return self.tokens_per_s
        return float(self.tokens * (last - first) / (self.ends_s[last] - self.ends_s[first]))

    @property
    def fill_s(self) -> float:
        """Seconds until the first micro-batch has passed all stages."""
        return float(self.ends_s[0])


def run_in_virtual_time(
    planned: PlannedJob, found: Forecast, conditions: Conditions, *, num_steps: int, observer: Observer | None = None
) -> VirtualRun:
    """Simulate all stages and lanes for `num_steps` micro-batches of a forecast.

    Raises ConfigError if a slow rank or link is none of the job's.
    """
    for rank in (*conditions.slow_ranks, *conditions.slow_links):
        if rank >= found.num_ranks:
            raise ConfigError(f"rank {rank} cannot be slow: the job has {found.num_ranks:,} ranks, counted from 0")
    ends_s = step_ends_s(
        [_steps(planned, found, conditions, index) for index in range(len(found.stages))],
        lanes=found.lanes,
        in_flight=found.in_flight,
        num_steps=num_steps,
        drains=True,
        observer=observer,
    )
    return VirtualRun(found.tokens, found.in_flight, ends_s)


def _steps(planned: PlannedJob, found: Forecast, conditions: Conditions, index: int) -> PhasesOf:
    """The phases of each step of a stage."""
    stage = planned.layout.grid.stages[index]
    step = replace(found.stages[index].step, layers=stage.layers)
    slow = _Slow(*(_factors(of, stage) for of in (conditions.slow_ranks, conditions.slow_links)))
    placements, routing = planned.layout.placements[index], conditions.routing
    if routing is None or not placements:
        return equal_steps(slow.phases(step.phases()))
    tokens, topology = round(found.tokens), step.costs.topology

    def routed(steps: range) -> Mapping[int, RoutedRows]:
        return {
            layer: routed_rows(routing.counts(layer, steps, tokens), tokens, placement, topology)
            for layer, placement in placements.items()
        }

    return _RoutedSteps(step, routed, slow)


def _factors(of_ranks: Mapping[int, float], stage: Stage) -> float:
    """The factors of the ranks of a stage (R,), 1.0 if all are."""
    own = {rank: factor for rank, factor in of_ranks.items() if rank in stage.ranks}
    return np.array([own.get(rank, 1.0) for rank in stage.ranks]) if own else 1.0  # type: ignore[return-value]


@dataclass(frozen=True)
class _Slow:
    """Factors on the computing and on the links of the ranks of a stage, arrays (R,) if there is any."""

    rank: float
    link: float

    def phases(self, phases: Sequence[Phase]) -> list[Phase]:
        """The phases with these factors."""
        if isinstance(self.rank, float) and isinstance(self.link, float):
            return list(phases)
        return [
            Phase(
                phase.point,
                phase.compute_s * self.rank,
                [self._transmission(one) for one in phase.transmissions],
                phase.beside_s * self.rank,
                phase.sent and self._transmission(phase.sent),
                phase.preemptible_s * self.rank,
            )
            for phase in phases
        ]

    def _transmission(self, one: Transmission) -> Transmission:
        return Transmission(one.link_s * self.link, one.latency_s * self.link)


class _RoutedSteps:
    """The phases of each step of a stage with uneven routing, computed for several steps at once."""

    def __init__(self, step: StageStep, routed: Callable[[range], Mapping[int, RoutedRows]], slow: _Slow) -> None:
        self._step = step
        self._routed = routed
        self._slow = slow
        self._steps = range(0)
        self._phases: Sequence[Phase] = ()

    def __call__(self, step: int) -> Sequence[Phase]:
        if step not in self._steps:
            self._steps = range(step, step + max(1, MOST_NUMBERS // self._step.ranks))
            load = replace(self._step.load, routed=self._routed(self._steps))
            self._phases = self._slow.phases(replace(self._step, load=load).phases())
        return [_of_step(phase, step - self._steps.start) for phase in self._phases]


def _of_step(phase: Phase, index: int) -> Phase:
    """One step of a phase whose numbers are arrays (n, R) where steps differ."""
    return Phase(
        phase.point,
        _one(phase.compute_s, index),
        [Transmission(_one(one.link_s, index), _one(one.latency_s, index)) for one in phase.transmissions],
        _one(phase.beside_s, index),
        phase.sent and Transmission(_one(phase.sent.link_s, index), _one(phase.sent.latency_s, index)),
        _one(phase.preemptible_s, index),
    )


def _one(numbers: float, index: int) -> float:
    if isinstance(numbers, np.ndarray) and numbers.ndim == 2:
        return numbers[index]
    return numbers
