"""The time of a stage's lanes with and without overlap: the schedule replayed with durations. Pure.

The host computes for one lane at a time, in the order of the schedule. A rank's link carries one transmission after
another, in the order in which they start. A lane is resumed when its transfer has arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import NamedTuple

from moempi.layout.schedule import LaneOrder, Point

WARM_UP_STEPS = 8
MEASURED_STEPS = 16
NO_LANE = -1


class Transmission(NamedTuple):
    """Rows or counts on the way: they occupy the link for `link_s` and arrive `latency_s` later."""

    link_s: float = 0.0
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a lane: `compute_s` of computing, then one transfer, and `beside_s` more of computing up to `point`.

    Each of the transfer's `transmissions` starts as soon as the previous one has arrived, whichever lane computes. The
    lane does not wait for `sent`, which starts at the same time.
    """

    point: Point
    compute_s: float
    transmissions: Sequence[Transmission] = ()
    beside_s: float = 0.0
    sent: Transmission | None = None

    @property
    def travel_s(self) -> float:
        """Seconds of all transmissions for which the lane waits, on a link that is free."""
        return sum(map(sum, self.transmissions))

    @property
    def link_s(self) -> float:
        """Seconds in which the phase occupies the link."""
        return sum(one.link_s for one in (*self.transmissions, *([self.sent] if self.sent else [])))


class _Link:
    """The link of a rank, and the transfers of its lanes: at most one of each lane at a time."""

    def __init__(self, num_lanes: int) -> None:
        self.arrivals = [0.0] * num_lanes
        self._free_at = 0.0
        self._order = count()
        self._events: list[tuple[float, int, int, Sequence[Transmission]]] = []

    def start(self, lane: int, at: float, transmissions: Sequence[Transmission]) -> None:
        """Start a transfer of a lane; its arrival is infinite until `advance` has found it."""
        if lane != NO_LANE:
            self.arrivals[lane] = inf
        heappush(self._events, (at, next(self._order), lane, transmissions))

    def advance(self, until: float) -> None:
        """Find all arrivals up to a time before which every transfer has been started."""
        while self._events and self._events[0][0] <= until:
            self._advance_one()

    def first_arrival(self, lanes: Sequence[int]) -> float:
        """When the first transfer of these lanes arrives, if no further one is started meanwhile."""
        while self._events and min(self.arrivals[lane] for lane in lanes) > self._events[0][0]:
            self._advance_one()
        return min(self.arrivals[lane] for lane in lanes)

    def _advance_one(self) -> None:
        at, _, lane, transmissions = heappop(self._events)
        if transmissions:
            transmission, *later = transmissions
            if transmission.link_s:
                at = self._free_at = max(at, self._free_at) + transmission.link_s
            self.start(lane, at + transmission.latency_s, later)
        elif lane != NO_LANE:
            self.arrivals[lane] = at


def waiting_s(phases: Sequence[Phase], *, lanes: int) -> float:
    """Seconds for one step of each of `lanes` lanes if the host waits for every transfer."""
    return lanes * sum(phase.compute_s + phase.beside_s + phase.travel_s for phase in phases)


def overlapped_s(phases: Sequence[Phase], *, lanes: int) -> float:
    """Seconds for one step of each of `lanes` interleaved lanes, in the steady state.

    Consecutive steps overlap, so this is a mean over MEASURED_STEPS steps of each lane, after WARM_UP_STEPS. Where a
    lane is within its step differs between begin and end of them, so the time is at least that of compute and link.
    """
    compute_s, link_s = sum(phase.compute_s + phase.beside_s for phase in phases), sum(phase.link_s for phase in phases)
    order, link, host_s = LaneOrder(lanes, [phase.point for phase in phases]), _Link(lanes), 0.0
    index, steps, begins = [-1] * lanes, 0, []
    while steps <= (WARM_UP_STEPS + MEASURED_STEPS) * lanes:
        candidates = order.candidates()
        link.advance(host_s)
        host_s = max(host_s, link.first_arrival(candidates))
        lane = next(lane for lane in candidates if link.arrivals[lane] <= host_s)
        order.resume(lane)
        index[lane] = (index[lane] + 1) % len(phases)
        phase = phases[index[lane]]
        order.wait(lane, phase.point)
        host_s += phase.compute_s
        link.start(lane, host_s, phase.transmissions)
        if phase.sent is not None:
            link.start(NO_LANE, host_s, [phase.sent])
        host_s += phase.beside_s
        if index[lane] == 0:
            steps += 1
            begins.append(host_s)
    return max((begins[-1] - begins[WARM_UP_STEPS * lanes]) / MEASURED_STEPS, lanes * compute_s, lanes * link_s)
