"""The time of a stage's lanes with and without overlap: the schedule replayed with durations. Pure.

The host computes for one lane at a time, in the order of the schedule. A rank's link carries one transfer after
another. A lane continues when its transfer has arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.layout.schedule import Point, schedule


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a lane: `compute_s` of computing up to `point`, then a transfer.

    The transfer occupies the link for `link_s` and arrives `latency_s` later. An `eager` transfer starts as soon as the
    previous one has arrived, even while another lane computes, like rows after their counts.
    """

    point: Point
    compute_s: float
    link_s: float = 0.0
    latency_s: float = 0.0
    eager: bool = False


@dataclass(slots=True)
class _Link:
    free_at: float = 0.0

    def arrival(self, start: float, phase: Phase) -> float:
        if phase.link_s:
            start = self.free_at = max(start, self.free_at) + phase.link_s
        return start + phase.latency_s


def waiting_s(phases: Sequence[Phase], *, lanes: int) -> float:
    """Seconds for one step of each of `lanes` lanes if the host waits for every transfer."""
    return lanes * sum(phase.compute_s + phase.link_s + phase.latency_s for phase in phases)


def overlapped_s(phases: Sequence[Phase], *, lanes: int, rounds: int = 4) -> float:
    """Seconds for one step of each of `lanes` interleaved lanes, in the steady state.

    Consecutive steps overlap, so this is the mean of `rounds` steps after a first one.
    """
    link, host = _Link(), 0.0
    arrivals = [0.0] * lanes
    ends: list[float] = []
    for lane, index in schedule(lanes, range(len(phases)), side_by_side=lanes):
        phase, arrived = phases[index], arrivals[lane]
        host = max(host, arrived) + phase.compute_s
        arrivals[lane] = link.arrival(arrived if phase.eager else host, phase)
        if phase is phases[-1] and lane == lanes - 1:
            ends.append(max(host, *arrivals))
            if len(ends) > rounds:
                break
    return (ends[-1] - ends[0]) / rounds
