"""The replayed schedule against the lanes' own interleaving on a clock that only they move."""

import random

import pytest

from moempi.engine.interleave import interleave
from moempi.layout.schedule import Point
from moempi.planning.simulate import Phase, overlapped_s, waiting_s

STEPS = 6


def on_a_clock(phases, *, lanes):
    """Generators under `interleave` that compute and send by moving a clock: when all lanes have taken each step."""
    clock, link = [0.0], [0.0]
    ends = []

    def lane(index):
        arrived = 0.0
        for _ in range(STEPS):
            for phase in phases:
                left = arrived
                clock[0] = max(clock[0], arrived) + phase.compute_s
                if not phase.eager:
                    left = clock[0]
                if phase.link_s:
                    link[0] = left = max(link[0], left) + phase.link_s
                arrived = left + phase.latency_s
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


def test_lanes_take_what_they_take_on_a_clock():
    dice = random.Random(2)
    for _ in range(200):
        phases, lanes = random_phases(dice), dice.randrange(1, 5)
        ends = on_a_clock(phases, lanes=lanes)
        found = overlapped_s(phases, lanes=lanes, rounds=STEPS - 1)
        assert found == pytest.approx((ends[-1] - ends[0]) / (STEPS - 1)), (phases, lanes)


def test_a_turn_is_at_least_its_computing_and_its_link_and_at_most_both():
    dice = random.Random(7)
    for _ in range(300):
        phases, lanes = random_phases(dice), dice.randrange(1, 5)
        overlapped, waiting = overlapped_s(phases, lanes=lanes), waiting_s(phases, lanes=lanes)
        compute, carry = lanes * sum(phase.compute_s for phase in phases), lanes * sum(phase.link_s for phase in phases)
        assert max(compute, carry) <= overlapped * (1 + 1e-9)
        assert overlapped <= waiting * (1 + 1e-9)


@pytest.mark.parametrize(("compute", "carry", "both"), [(1.0, 1.0, 2.0), (1.0, 0.5, 2.0), (0.5, 1.0, 2.0)])
def test_two_lanes_hide_what_is_shorter(compute, carry, both):
    phases = [Phase(Point(0, "dispatch"), compute, link_s=carry)]
    assert overlapped_s(phases, lanes=2) == pytest.approx(both)
    assert waiting_s(phases, lanes=2) == pytest.approx(2 * (compute + carry))
    assert overlapped_s(phases, lanes=1) == pytest.approx(compute + carry)
