"""What a stage's lanes take with and without overlap: the schedule replayed with seconds instead of rows. Pure.

The host computes for one lane at a time, in the order of the schedule; a rank's link carries one transfer after
another. A lane goes on when what it waits for has arrived.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.layout.schedule import Point, schedule


@dataclass(frozen=True, slots=True)
class Phase:
    """A lane's way to its next point: it computes, then something travels.

    That takes `carry_s` of the link and arrives `latency_s` later. `ahead`: it leaves by itself as soon as what
    travelled before it has arrived, also while another lane computes (rows follow their counts so).
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
    """Seconds in which `lanes` lanes take one step each when the host waits for all that travels."""
    return lanes * sum(leg.compute_s + leg.link_s + leg.latency_s for leg in phases)


def overlapped_s(phases: Sequence[Phase], *, lanes: int, rounds: int = 4) -> float:
    """Seconds in which `lanes` lanes take one step side by side, in the long run.

    As a step ends where the next begins, the mean of `rounds` of them is taken after a first.
    """
    link, host = _Link(), 0.0
    arrivals = [0.0] * lanes
    ends: list[float] = []
    for lane, point in schedule(lanes, range(len(phases)), side_by_side=lanes):
        leg, before = phases[point], arrivals[lane]
        host = max(host, before) + leg.compute_s
        arrivals[lane] = link.arrival(before if leg.eager else host, leg)
        if leg is phases[-1] and lane == lanes - 1:
            ends.append(max(host, *arrivals))
            if len(ends) > rounds:
                break
    return (ends[-1] - ends[0]) / rounds
