"""Search for the fastest layout of a job on a machine. Pure.

Bounds and estimates of the speeds of all candidates, which need no simulation, are computed in arrays. Candidates are
then simulated in the order of their estimates, which each simulation corrects. An exact search ends when no bound
exceeds the highest speed: the result is as fast as if all were simulated, less `gain`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from moempi.arrays import BoolArray, Float64Array, IntArray
from moempi.layout.layout import make_layout
from moempi.planning.candidates import Candidates, Shape
from moempi.planning.forecast import Forecast, PlannedJob, forecast, forecast_step
from moempi.planning.workload import Workload

GAIN = 0.005
"""A candidate is simulated if its bound is better than the best by more than this share."""
PATIENCE = 12
"""Candidates that are simulated in a row without a better one before a search that is not exact ends."""
FRONT_STEP = 0.2
"""The least share by which the latency decreases from a row of the Pareto front to the next."""
UNKNOWN = 0.0
"""The ratio of actual seconds to estimated ones of a kind of which nothing was simulated."""
UNLIKELY = 1e9
"""The factor of the estimates of candidates that are likely to exceed a limit."""

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
        stages = np.array([one.shape.stages for one in self.layouts], int)[self._layout_of]
        lanes = self._joined("lanes", lambda one: one.steps.lanes)
        is_full = self._joined("full", lambda one: one.forecast.is_full)
        kinds = np.unique(np.stack([stages, lanes, is_full]), axis=1, return_inverse=True)[1]
        self._kinds = kinds.reshape(-1)  # NumPy 2.0 returns (1, n)
        self._ratios = np.full(self.num_candidates, UNKNOWN)

    @property
    def num_candidates(self) -> int:
        """Kinds of steps of all layouts."""
        return len(self._layout_of)

    @property
    def num_simulated(self) -> int:
        """Candidates of which stages were simulated so far."""
        return len(self._simulated)

    def fastest(self, limits: Limits, *, without: Shape | None = None, exact: bool = False) -> Found | None:
        """The fastest candidate that keeps the limits and has another shape than `without`, if there is one.

        If `exact`, it is the fastest of all, less `gain`.
        """
        allowed = np.array([one.shape != without for one in self.layouts], bool)
        if any(self.soonest(latency)[1] > limit for latency, limit in limits.items()):
            return None
        return self._least(token_s, limits, allowed, exact=exact)

    def soonest(self, latency: Cost) -> tuple[Found | None, float]:
        """The candidate with the least latency, and that; infinite if there are no candidates."""
        if latency not in self._soonest:
            found = self._least(latency, {}, np.ones(len(self.layouts), bool), exact=True)
            seconds = latency(1, found.forecast, found.forecast.micro_batch_s(overlap=True)) if found else inf
            self._soonest[latency] = found, seconds
        return self._soonest[latency]

    def front(self, limits: Limits) -> Iterator[Found]:
        """The fastest candidate that keeps the limits, then the fastest whose latency is shorter by FRONT_STEP, ..."""
        latency = next_token_s if self._workload.output else first_token_s
        found = self.fastest(limits, exact=not limits)
        while found is not None:
            yield found
            found = self.fastest({**limits, latency: (1 - FRONT_STEP) * found.latency_s})

    def _least(self, cost: Cost, limits: Limits, allowed: BoolArray, *, exact: bool = False) -> Found | None:
        """The candidate of the allowed layouts that costs least within the limits.

        The likeliest is tried next, until PATIENCE simulations in a row found none better, or five times as many none
        that keeps the limits; the first of a kind does not count. If `exact`, all others that may be better follow in
        the order of their bounds; if none keeps the limits, as many as before.
        """
        left, bounds = self._possible(limits, allowed), self._bounds(cost)
        best, least, worse = None, inf, 0
        while len(left):
            patience = 5 * PATIENCE if best is None else PATIENCE
            if worse < patience:
                at = self._likeliest(left, cost, limits)
            elif exact or (best is None and worse < 2 * patience):
                at = int(np.argmin(bounds[left]))
            else:
                break
            index = int(left[at])
            is_tried = index in self._simulated or self._ratios[self._kinds[index]] == UNKNOWN
            found = self._cost_of(index, cost, limits)
            best, least, worse = (index, found, 0) if found < least else (best, least, worse + (not is_tried))
            if self._stops():
                break
            left = np.delete(left, at)
            left = left[bounds[left] * (1 + self._gain) < least]
        return None if best is None else self._found(best)

    def _likeliest(self, indices: IntArray, cost: Cost, limits: Limits) -> int:
        """The position of the candidate with the least estimate, before those that are likely to exceed a limit.

        Estimates are corrected by the last simulation of a candidate of the same kind, which has as many stages and
        lanes, and as full a pipeline or not. Where there was none yet, they are the bounds.
        """
        ratios = self._ratios[self._kinds[indices]]

        def estimates(of: Cost) -> Float64Array:
            return np.where(ratios == UNKNOWN, self._bounds(of)[indices], ratios * self._estimates(of)[indices])

        found = estimates(cost)
        for other, limit in limits.items():
            found[estimates(other) > limit] *= UNLIKELY
        return int(np.argmin(found))

    def _cost_of(self, index: int, cost: Cost, limits: Limits) -> float:
        """The cost of a candidate; infinite beyond the limits."""
        replicas, found = self.layouts[self._layout_of[index]].replicas, self._forecast(index)
        micro_batch_s = found.micro_batch_s(overlap=True)
        self._ratios[self._kinds[index]] = micro_batch_s / found.likely_s
        keeps = all(of(replicas, found, micro_batch_s) <= limit for of, limit in limits.items())
        return cost(replicas, found, micro_batch_s) if keeps else inf

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
