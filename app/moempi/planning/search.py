"""Search for the fastest layout of a job on a machine. Pure.

Bounds of the speeds of all candidates, which need no simulation, are computed in arrays. Candidates are then simulated
in the order of their bounds, until no bound exceeds the highest speed: the result is as fast as if all were simulated,
less `gain`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf, log1p

import numpy as np

from moempi.arrays import BoolArray, Float64Array, IntArray
from moempi.layout.layout import make_layout
from moempi.planning.candidates import Candidates, Shape
from moempi.planning.forecast import Forecast, PlannedJob, forecast, forecast_step
from moempi.planning.workload import Workload

GAIN = 0.005
"""A candidate is simulated if its bound is better than the best by more than this share."""
PATIENCE = 30
"""Candidates that are tried in a row without a better one, if not all are."""
FRONT_STEP = 0.2
"""The least share by which the latency decreases from a row of the Pareto front to the next."""
LEVEL = log1p(0.002)
"""The logarithm of the ratio of estimates that count as equal in the order of candidates."""

Cost = Callable[[int, Forecast, float], float]
"""cost(replicas, forecast, seconds of a micro-batch), which rises with the seconds; takes arrays."""
Limits = Mapping[Cost, float]
"""The most that each of these costs may be."""


def token_s(replicas: int, found: Forecast, micro_batch_s: float) -> float:
    """Seconds for each token of all replicas: the inverse of the speed."""
    return micro_batch_s / found.tokens / replicas


def next_token_s(_replicas: int, found: Forecast, micro_batch_s: float) -> float:
    """Seconds from a sequence's token to its next."""
    return found.in_flight * micro_batch_s


def first_token_s(_replicas: int, found: Forecast, micro_batch_s: float) -> float:
    """Seconds from the first step of a prompt to the token after it."""
    return found.first_token_steps * found.in_flight * micro_batch_s


@dataclass(frozen=True, slots=True)
class Found:
    """A job that a search found, for one of `shape.replicas` equal parts of the ranks."""

    shape: Shape
    planned: PlannedJob
    forecast: Forecast

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second of all replicas."""
        return self.shape.replicas * self.forecast.tokens_per_s(overlap=True)

    @property
    def latency_s(self) -> float:
        """What a sequence waits for: seconds to its next token, or to its first if there is no other."""
        found = self.forecast
        return found.seconds(overlap=True) if found.workload.output else found.first_token_s


def _never() -> bool:
    return False


class Search:
    """A search among candidates; what has been simulated is kept for the next question.

    Where `stops` becomes true, it gives what it has found so far.
    """

    def __init__(
        self,
        layouts: Iterable[Candidates],
        workload: Workload,
        *,
        gain: float = GAIN,
        stops: Callable[[], bool] = _never,
    ) -> None:
        self.layouts = list(layouts)
        self._workload = workload
        self._gain = gain
        self._stops = stops
        sizes = [np.size(one.steps.slots) for one in self.layouts]
        self._layout_of = np.repeat(np.arange(len(sizes)), sizes)
        self._first_of = np.cumsum([0, *sizes])
        self._simulated: dict[int, Forecast] = {}
        self._soonest: dict[Cost, tuple[Found | None, float]] = {}
        self._numbers: dict[object, Float64Array] = {}

    @property
    def num_candidates(self) -> int:
        """Kinds of steps of all layouts."""
        return len(self._layout_of)

    @property
    def num_simulated(self) -> int:
        """Candidates of which stages were simulated so far."""
        return len(self._simulated)

    def fastest(self, limits: Limits, *, without: Shape | None = None, patience: float = PATIENCE) -> Found | None:
        """The fastest candidate that keeps the limits and has another shape than `without`, if there is one.

        With infinite `patience` it is the fastest of all, less `gain`; else the search gives up after that many
        candidates in a row that were no faster.
        """
        allowed = np.array([one.shape != without for one in self.layouts], bool)
        if any(self.soonest(latency)[1] > limit for latency, limit in limits.items()):
            return None
        return self._least(token_s, limits, allowed, patience)

    def soonest(self, latency: Cost) -> tuple[Found | None, float]:
        """The candidate with the least latency, and that; infinite if there are no candidates."""
        if latency not in self._soonest:
            found = self._least(latency, {}, np.ones(len(self.layouts), bool), PATIENCE)
            seconds = latency(1, found.forecast, found.forecast.micro_batch_s(overlap=True)) if found else inf
            self._soonest[latency] = found, seconds
        return self._soonest[latency]

    def front(self, limits: Limits) -> Iterator[Found]:
        """The fastest candidate that keeps the limits, then the fastest whose latency is shorter by FRONT_STEP, ..."""
        latency = next_token_s if self._workload.output else first_token_s
        found = self.fastest(limits, patience=PATIENCE if limits else inf)
        while found is not None:
            yield found
            found = self.fastest({**limits, latency: (1 - FRONT_STEP) * found.latency_s})

    def _least(self, cost: Cost, limits: Limits, allowed: BoolArray, patience: float) -> Found | None:
        """The candidate of the allowed layouts that costs least within the limits.

        The likely ones are tried first, until PATIENCE in a row are no better, then those of a low bound, until
        `patience` are. Five times as many are tried to find the first that keeps the limits.
        """
        possible = self._possible(limits, allowed)
        if not len(possible):
            return None
        best, least, bounds = None, inf, self._bounds(cost)
        for order, most in ((self._likely_order, PATIENCE), (self._bound_order, patience)):
            worse = 0
            for index in possible[order(possible, cost, limits)].tolist():
                if bounds[index] * (1 + self._gain) < least:
                    found = self._cost_of(index, cost, limits, least)
                    best, least, worse = (index, found, 0) if found < least else (best, least, worse + 1)
                if self._stops() or worse >= (most if best is not None else 5 * most):
                    break
        return None if best is None else self._found(best)

    def _cost_of(self, index: int, cost: Cost, limits: Limits, least: float) -> float:
        """The cost of a candidate; infinite beyond the limits, or if its stages alone cost as good as `least`."""
        replicas, found = self.layouts[self._layout_of[index]].replicas, self._forecast(index)

        def at(micro_batch_s: float) -> float:
            keeps = all(of(replicas, found, micro_batch_s) <= limit for of, limit in limits.items())
            return cost(replicas, found, micro_batch_s) if keeps else inf

        return at(found.micro_batch_s(overlap=True)) if at(found.slowest_s) * (1 + self._gain) < least else inf

    def _likely_order(self, indices: IntArray, cost: Cost, limits: Limits) -> IntArray:
        """The order of candidates by their estimates, those that are likely to keep the limits before the others.

        Of equal estimates, full pipelines are first, whose stages need not be simulated together.
        """
        unlikely = np.zeros(len(indices), bool)
        for other, limit in limits.items():
            unlikely |= self._estimates(other)[indices] > limit
        levels = np.floor(np.log(self._estimates(cost)[indices]) / LEVEL)
        full = self._joined("full", lambda one: one.forecast.is_full)[indices].astype(bool)
        return np.lexsort((~full, levels, unlikely))

    def _bound_order(self, indices: IntArray, cost: Cost, _limits: Limits) -> IntArray:
        """The order of candidates by their bounds."""
        return np.argsort(self._bounds(cost)[indices], kind="stable")

    def _possible(self, limits: Limits, allowed: BoolArray) -> IntArray:
        """The candidates of the allowed layouts whose bounds keep the limits."""
        possible = allowed[self._layout_of]
        for cost, limit in limits.items():
            possible &= self._bounds(cost) <= limit
        return np.flatnonzero(possible)

    def _bounds(self, cost: Cost) -> Float64Array:
        return self._joined(("bound", cost), lambda one: cost(one.replicas, one.forecast, one.forecast.least_s))

    def _estimates(self, cost: Cost) -> Float64Array:
        return self._joined(("estimate", cost), lambda one: cost(one.replicas, one.forecast, one.forecast.likely_s))

    def _joined(self, name: object, numbers: Callable[[Candidates], float]) -> Float64Array:
        """The numbers of the candidates of all layouts (n,), computed once for each name."""
        if name not in self._numbers:
            self._numbers[name] = np.concatenate([np.zeros(0), *(np.asarray(numbers(one)) for one in self.layouts)])
        return self._numbers[name]

    def _forecast(self, index: int) -> Forecast:
        if index not in self._simulated:
            layout, step = self._candidate(index)
            self._simulated[index] = forecast_step(layout.planned, self._workload, layout.step(step))
        return self._simulated[index]

    def _candidate(self, index: int) -> tuple[Candidates, int]:
        layout = int(self._layout_of[index])
        return self.layouts[layout], index - int(self._first_of[layout])

    def _found(self, index: int) -> Found:
        """The job of a candidate, laid out again with its own slots and checked for its memory."""
        layout, step = self._candidate(index)
        job, of = layout.job(step), layout.planned
        on_gpu = job.run.backend == "cupy"
        planned = replace(of, job=job, layout=make_layout(job, of.architecture, of.topology.nodes, on_gpu=on_gpu))
        forecast(planned, self._workload)
        return Found(layout.shape, planned, self._forecast(index))
