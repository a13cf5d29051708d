"""The time of a stage's lanes with and without overlap: the schedule replayed with durations. Pure.

A rank's host computes for one lane at a time, in the order of the schedule. What is preemptible, it computes only while
no other lane has anything else to compute, and one lane after another, in the order in which they were resumed; on a
GPU, whose blocks are not interrupted, those that run delay the others by up to the time of a block. Its link carries
one transmission after another, in the order in which they start. A lane is resumed when its transfer has arrived from
all ranks. Where all ranks of a stage take equal times, one stands for all.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import NamedTuple

import numpy as np

from moempi.arrays import larger, where
from moempi.layout.schedule import LaneOrder, Point

WARM_UP_STEPS = 8
MEASURED_STEPS = 16


class Transmission(NamedTuple):
    """Rows or counts on the way: they occupy the link for `link_s` and arrive `latency_s` later.

    Where ranks differ, both are arrays (R,).
    """

    link_s: float = 0.0
    latency_s: float = 0.0


class Phase(NamedTuple):
    """One phase of a lane: `compute_s` of computing, then one transfer, and `beside_s` more of computing up to `point`.

    Each of the transfer's `transmissions` starts as soon as the previous one has arrived, whichever lane computes. The
    lane does not wait for `sent`, which starts at the same time. The first `preemptible_s` of `compute_s` give way to
    other lanes. Where ranks differ, the seconds are arrays (R,).
    """

    point: Point
    compute_s: float
    transmissions: Sequence[Transmission] = ()
    beside_s: float = 0.0
    sent: Transmission | None = None
    preemptible_s: float = 0.0

    @property
    def travel_s(self) -> float:
        """Seconds of all transmissions for which the lane waits, on a link that is free."""
        return sum(map(sum, self.transmissions))

    @property
    def link_s(self) -> float:
        """Seconds in which the phase occupies the link."""
        return sum(one.link_s for one in (*self.transmissions, *([self.sent] if self.sent else [])))


PhasesOf = Callable[[int], Sequence[Phase]]
"""phases_of(step) are the phases of a step."""


class Resumed(NamedTuple):
    """A lane that was resumed, whether it has begun a step, and when what it sent arrives, if anything.

    What it waited for arrived at `arrived_s`. The last rank computed in `spans`, between which it gave way.
    """

    lane: int
    begins: bool
    sent_s: float
    arrived_s: float
    spans: Sequence[tuple[float, float]]

    @property
    def begin_s(self) -> float:
        """When the last rank began to compute."""
        return self.spans[0][0]

    @property
    def end_s(self) -> float:
        """When the last rank had computed all."""
        return self.spans[-1][1]


class VirtualStage:
    """A stage in virtual time: hosts and links of its ranks, and its lanes, all at the last point of a step at 0 s.

    Lane n takes steps n, n + lanes, ..., and `phases_of` gives the phases of each. A lane waits at every point until
    its transfer has arrived, for which all ranks have sent. All ranks resume lanes in the same order, as the last of
    them decides. If the stage is `fed`, what arrives at the first point of a step is another stage's: `feed` says when.
    """

    def __init__(self, phases_of: PhasesOf, *, lanes: int, fed: bool = False) -> None:
        self._phases_of = phases_of
        first = phases_of(0)
        if fed:  # there is no step before, whose end would take time
            first = [first[0]._replace(compute_s=0.0, beside_s=0.0, sent=None, preemptible_s=0.0), *first[1:]]
        self._phases = [first] * lanes
        self._steps = [lane - lanes for lane in range(lanes)]
        self._fed = fed
        self._order = LaneOrder(lanes, [phase.point for phase in first])
        self._hosts = _Hosts()
        self._link = _Link(lanes)
        self._at = [-1] * lanes
        self._candidates = self._order.candidates()
        self._next_s: float | None = None
        self._resumes = True

    def feed(self, lane: int, at_s: float) -> None:
        """What a lane waits for at its first point arrives at this time."""
        self._link.arrivals[lane] = at_s
        self._next_s = None

    def step(self, lane: int) -> int:
        """The step that a lane takes or waits for; below 0 if it has not begun."""
        return self._steps[lane]

    def next_s(self) -> float:
        """When a lane is resumed next, or has computed what gives way; infinite if all wait for another stage."""
        if self._next_s is None:
            end_s = self._hosts.first_end_s()
            arrival_s = self._link.first_arrival(self._candidates, before=end_s)
            resume_s = max(latest(self._hosts.free_s), arrival_s)
            self._resumes = resume_s < end_s
            self._next_s = min(resume_s, end_s)
        return self._next_s

    def advance(self) -> Resumed | None:
        """Go on to `next_s`; the lane that has computed up to its next point, None if it gives way before."""
        at_s = self.next_s()
        computed = self._resume(at_s) if self._resumes else self._hosts.end_first()
        self._next_s = None
        return None if computed is None else self._wait(computed)

    def _resume(self, at_s: float) -> "_Computing | None":
        """Resume the first lane whose transfer has arrived; its phase if that is computed without giving way."""
        self._link.advance(at_s)
        arrivals = self._link.arrivals
        lane = next(lane for lane in self._candidates if arrivals[lane] <= at_s)
        self._order.resume(lane)
        index = self._at[lane] = (self._at[lane] + 1) % len(self._phases[lane])
        phase, begins = self._phases[lane][index], index == 0
        if begins:
            self._phases[lane] = self._phases_of(self._steps[lane] + len(self._at))
        self._order.wait(lane, phase.point)
        self._candidates = self._order.candidates()
        computing = _Computing(lane, phase, begins, arrivals[lane], phase.preemptible_s)
        arrivals[lane] = inf
        return computing if self._hosts.compute(computing) else None

    def _wait(self, computed: "_Computing") -> Resumed:
        """Let a lane wait for the transfer of a phase that it has computed."""
        lane, phase, begins, ended_s = computed.lane, computed.phase, computed.begins, computed.ended_s
        if begins:
            self._steps[lane] += len(self._at)
        if not (begins and self._fed):
            self._link.start(lane, ended_s, phase.transmissions)
        sent_s = ended_s if phase.sent is None else self._link.send(ended_s, phase.sent)
        return Resumed(lane, begins, latest(sent_s), computed.arrived_s, computed.spans)


@dataclass(slots=True)
class _Computing:
    """A phase that a resumed lane computes; on each rank, `left_s` of what is preemptible are left.

    A rank has computed all but what is beside the transfer at `ended_s`, which is infinite until it is known.
    """

    lane: int
    phase: Phase
    begins: bool
    arrived_s: float
    left_s: float
    ended_s: float = inf
    spans: list[tuple[float, float]] = field(default_factory=list)

    def add_span(self, begin_s: float, end_s: float) -> None:
        """The last rank has computed from `begin_s` to `end_s`."""
        begin_s, end_s = latest(begin_s), latest(end_s)
        if self.spans and self.spans[-1][1] >= begin_s:
            begin_s = self.spans.pop()[0]
        self.spans.append((begin_s, end_s))


class _Hosts:
    """The hosts of the ranks of a stage, and the phases that give way; what was computed up to `free_s` is known."""

    def __init__(self) -> None:
        self.free_s = 0.0
        self._preemptible: deque[_Computing] = deque()

    def compute(self, computing: _Computing) -> bool:
        """Begin a phase whose lane was resumed, before all that gives way; whether it is computed, or gives way too."""
        if self._preemptible:
            self._compute_preemptible(computing.arrived_s)
        self.free_s = larger(self.free_s, computing.arrived_s)
        if latest(computing.left_s) > 0:
            self._preemptible.append(computing)
            return False
        begin_s, phase = self.free_s, computing.phase
        computing.ended_s = begin_s + phase.compute_s
        self.free_s = computing.ended_s + phase.beside_s
        computing.add_span(begin_s, self.free_s)
        return True

    def first_end_s(self) -> float:
        """When the last rank will have computed what gives way of the first phase; infinite if no phase does."""
        if not self._preemptible:
            return inf
        first = self._preemptible[0]
        return latest(where(first.ended_s == inf, self.free_s + first.left_s, first.ended_s))

    def end_first(self) -> _Computing:
        """Compute up to `first_end_s`; the first phase."""
        self._compute_preemptible(self.first_end_s())
        return self._preemptible.popleft()

    def _compute_preemptible(self, until_s: float) -> None:
        """Compute what gives way, one phase after another, and behind each its rest, which does not."""
        is_free: bool = True
        for one in self._preemptible:
            computes = is_free & (one.ended_s == inf)
            if not latest(computes):
                continue
            begin_s, end_s = self.free_s, self.free_s + one.left_s
            ends = computes & (end_s <= until_s)
            self.free_s = where(computes, where(ends, end_s, larger(begin_s, until_s)), begin_s)
            one.left_s = where(ends, 0.0, one.left_s - (self.free_s - begin_s))
            if latest(ends):
                self._compute_rest(one, ends)
            if latest(ends) or latest(self.free_s) > latest(begin_s):
                one.add_span(begin_s, self.free_s)
            is_free = is_free & (one.ended_s < inf)

    def _compute_rest(self, one: _Computing, ends: bool) -> None:
        """Compute what does not give way of a phase, on the ranks of which `ends` is true."""
        ended_s = self.free_s + (one.phase.compute_s - one.phase.preemptible_s)
        one.ended_s = where(ends, ended_s, one.ended_s)
        self.free_s = where(ends, ended_s + one.phase.beside_s, self.free_s)


class _Link:
    """The links of the ranks of a stage, and the transfers of its lanes: at most one of each lane at a time."""

    def __init__(self, num_lanes: int) -> None:
        self.arrivals = [0.0] * num_lanes
        self._free_at = 0.0
        self._order = count()
        self._events: list[tuple[float, int, int, float, Sequence[Transmission]]] = []

    def start(self, lane: int, at: float, transmissions: Sequence[Transmission]) -> None:
        """Start a transfer of a lane; its arrival is infinite until `advance` has found it."""
        self.arrivals[lane] = inf if transmissions else latest(at)
        if transmissions:
            heappush(self._events, (latest(at), next(self._order), lane, at, transmissions))

    def send(self, at: float, transmission: Transmission) -> float:
        """Send what no lane waits for; its arrival."""
        self.advance(latest(at))
        return self._carry(at, transmission)

    def advance(self, until: float) -> None:
        """Find all arrivals up to a time before which every transfer has been started."""
        while self._events and self._events[0][0] <= until:
            self._advance_one()

    def first_arrival(self, lanes: Sequence[int], *, before: float = inf) -> float:
        """When the first transfer of these lanes arrives, if no further one is started meanwhile.

        Any time that is not `before` stands for those that are not.
        """
        arrivals, events = self.arrivals, self._events
        first = min([arrivals[lane] for lane in lanes])
        while events and events[0][0] < first and events[0][0] < before:
            self._advance_one()
            first = min([arrivals[lane] for lane in lanes])
        return first

    def _advance_one(self) -> None:
        _, _, lane, at, (transmission, *others) = heappop(self._events)
        at = self._carry(at, transmission)
        if others:
            heappush(self._events, (at, next(self._order), lane, at, others))
        else:
            self.arrivals[lane] = at

    def _carry(self, at: float, transmission: Transmission) -> float:
        """Occupy the links with a transmission that starts at this time on each rank; its arrival from all of them."""
        link_s = transmission.link_s
        if isinstance(link_s, np.ndarray):
            occupied, sent_s = link_s > 0, larger(at, self._free_at) + link_s
            self._free_at, at = np.where(occupied, sent_s, self._free_at), np.where(occupied, sent_s, at)
        elif link_s:
            at = self._free_at = larger(at, self._free_at) + link_s
        return latest(at + transmission.latency_s)


def latest(seconds: float) -> float:
    """The time of the last rank."""
    return float(seconds.max()) if isinstance(seconds, np.ndarray) else seconds


def equal_steps(phases: Sequence[Phase]) -> PhasesOf:
    """The same phases for each step."""
    return lambda _: phases


def waiting_s(phases: Sequence[Phase], *, lanes: int) -> float:
    """Seconds for one step of each of `lanes` lanes if the host waits for every transfer."""
    return lanes * sum(phase.compute_s + phase.beside_s + phase.travel_s for phase in phases)


def overlapped_s(phases: Sequence[Phase], *, lanes: int) -> float:
    """Seconds for one step of each of `lanes` interleaved lanes, in the steady state.

    Consecutive steps overlap, so this is a mean over MEASURED_STEPS steps of each lane, after WARM_UP_STEPS. Where a
    lane is within its step differs between begin and end of them, so the time is at least that of compute and link.
    """
    compute_s, link_s = sum(phase.compute_s + phase.beside_s for phase in phases), sum(phase.link_s for phase in phases)
    stage, begins = VirtualStage(equal_steps(phases), lanes=lanes), list[float]()
    while len(begins) <= (WARM_UP_STEPS + MEASURED_STEPS) * lanes:
        resumed = stage.advance()
        if resumed is not None and resumed.begins:
            begins.append(resumed.end_s)
    return max((begins[-1] - begins[WARM_UP_STEPS * lanes]) / MEASURED_STEPS, lanes * compute_s, lanes * link_s)
