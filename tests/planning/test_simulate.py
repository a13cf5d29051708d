"""The simulated schedule against interleaved lanes on a virtual clock."""

import random

import pytest

from moempi.engine.interleave import interleave
from moempi.layout.schedule import Point
from moempi.planning.simulate import Phase, overlapped_s, waiting_s

STEPS = 6


def on_a_clock(phases, *, lanes):
    """The times at which all lanes have completed each step, from generators under `interleave` on a virtual clock."""
    clock, link = [0.0], [0.0]
    ends = []

    def lane(index):
        arrived = 0.0
        for _ in range(STEPS):
            for phase in phases:
                start = arrived
                clock[0] = max(clock[0], arrived) + phase.compute_s
                if not phase.eager:
                    start = clock[0]
                if phase.link_s:
                    link[0] = start = max(link[0], start) + phase.link_s
                arrived = start + phase.latency_s
                arrivals[index] = arrived
                if index == lanes - 1 and phase is phases[-1]:
                    ends.append(max(clock[0], *arrivals))
                yield phase.point

    arrivals = [0.0] * lanes
    interleave([lane(index) for index in range(lanes)], [phase.point for phase in phases], side_by_side=lanes)
    return ends


def random_phases(dice):
    phases = [
        Phase(
            Point(0, str(number)),
            dice.choice([0.0, dice.random()]),
            link_s=dice.choice([0.0, dice.random()]),
            latency_s=dice.choice([0.0, dice.random() / 5]),
            eager=number > 0 and dice.random() < 0.3,
        )
        for number in range(dice.randrange(1, 6))
    ]
    return phases if any(phase.compute_s for phase in phases) else random_phases(dice)


def test_simulated_times_equal_those_on_the_clock():
    dice = random.Random(2)
    for _ in range(200):
        phases, lanes = random_phases(dice), dice.randrange(1, 5)
        ends = on_a_clock(phases, lanes=lanes)
        found = overlapped_s(phases, lanes=lanes, rounds=STEPS - 1)
        assert found == pytest.approx((ends[-1] - ends[0]) / (STEPS - 1)), (phases, lanes)


def test_a_step_takes_at_least_its_compute_and_link_time_and_at_most_their_sum():
    dice = random.Random(7)
    for _ in range(300):
        phases, lanes = random_phases(dice), dice.randrange(1, 5)
        overlapped, waiting = overlapped_s(phases, lanes=lanes), waiting_s(phases, lanes=lanes)
        compute, link = lanes * sum(phase.compute_s for phase in phases), lanes * sum(phase.link_s for phase in phases)
        assert max(compute, link) <= overlapped * (1 + 1e-9)
        assert overlapped <= waiting * (1 + 1e-9)


@pytest.mark.parametrize(("compute", "link", "both"), [(1.0, 1.0, 2.0), (1.0, 0.5, 2.0), (0.5, 1.0, 2.0)])
def test_two_lanes_hide_the_shorter_of_compute_and_link_time(compute, link, both):
    phases = [Phase(Point(0, "dispatch"), compute, link_s=link)]
    assert overlapped_s(phases, lanes=2) == pytest.approx(both)
    assert waiting_s(phases, lanes=2) == pytest.approx(2 * (compute + link))
    assert overlapped_s(phases, lanes=1) == pytest.approx(compute + link)
