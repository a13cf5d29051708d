"""The replayed schedule against the lanes' own interleaving on a clock that only they move."""

import random

import pytest

from moempi.engine.interleave import interleave
from moempi.layout.schedule import Point
from moempi.planning.simulate import Leg, overlapped_s, waiting_s

STEPS = 6


def on_a_clock(legs, *, lanes):
    """Generators under `interleave` that compute and send by moving a clock: when all lanes have taken each step."""
    clock, link = [0.0], [0.0]
    ends = []

    def lane(index):
        arrived = 0.0
        for _ in range(STEPS):
            for leg in legs:
                left = arrived
                clock[0] = max(clock[0], arrived) + leg.compute_s
                if not leg.ahead:
                    left = clock[0]
                if leg.carry_s:
                    link[0] = left = max(link[0], left) + leg.carry_s
                arrived = left + leg.latency_s
                arrivals[index] = arrived
                if index == lanes - 1 and leg is legs[-1]:
                    ends.append(max(clock[0], *arrivals))
                yield leg.point

    arrivals = [0.0] * lanes
    interleave([lane(index) for index in range(lanes)], [leg.point for leg in legs], together=lanes)
    return ends


def random_legs(dice):
    legs = [
        Leg(
            Point(0, str(number)),
            dice.choice([0.0, dice.random()]),
            carry_s=dice.choice([0.0, dice.random()]),
            latency_s=dice.choice([0.0, dice.random() / 5]),
            ahead=number > 0 and dice.random() < 0.3,
        )
        for number in range(dice.randrange(1, 6))
    ]
    return legs if any(leg.compute_s for leg in legs) else random_legs(dice)


def test_lanes_take_what_they_take_on_a_clock():
    dice = random.Random(2)
    for _ in range(200):
        legs, lanes = random_legs(dice), dice.randrange(1, 5)
        ends = on_a_clock(legs, lanes=lanes)
        found = overlapped_s(legs, lanes=lanes, rounds=STEPS - 1)
        assert found == pytest.approx((ends[-1] - ends[0]) / (STEPS - 1)), (legs, lanes)


def test_a_turn_is_at_least_its_computing_and_its_link_and_at_most_both():
    dice = random.Random(7)
    for _ in range(300):
        legs, lanes = random_legs(dice), dice.randrange(1, 5)
        overlapped, waiting = overlapped_s(legs, lanes=lanes), waiting_s(legs, lanes=lanes)
        compute, carry = lanes * sum(leg.compute_s for leg in legs), lanes * sum(leg.carry_s for leg in legs)
        assert max(compute, carry) <= overlapped * (1 + 1e-9)
        assert overlapped <= waiting * (1 + 1e-9)


@pytest.mark.parametrize(("compute", "carry", "turn"), [(1.0, 1.0, 2.0), (1.0, 0.5, 2.0), (0.5, 1.0, 2.0)])
def test_two_lanes_hide_what_is_shorter(compute, carry, turn):
    legs = [Leg(Point(0, "dispatch"), compute, carry_s=carry)]
    assert overlapped_s(legs, lanes=2) == pytest.approx(turn)
    assert waiting_s(legs, lanes=2) == pytest.approx(2 * (compute + carry))
    assert overlapped_s(legs, lanes=1) == pytest.approx(compute + carry)
