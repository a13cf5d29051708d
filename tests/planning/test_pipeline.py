"""A pipeline in virtual time against its arithmetic: filling, slowest stage, micro-batches in flight, slow steps."""

import numpy as np
import pytest

from moempi.layout.schedule import ROWS, TOKENS, Point
from moempi.planning.pipeline import step_ends_s
from moempi.planning.simulate import Phase, Transmission, equal_steps, overlapped_s

LINK = Transmission(0.0, 0.25)


def stage(compute_s, *, first=False, travel_s=0.0):
    """A stage that computes, then waits for rows; LINK is the way to the next stage."""
    rows = [Transmission(travel_s)] if travel_s else []
    return equal_steps([Phase(TOKENS if first else ROWS, 0.0, sent=LINK), Phase(Point(0, "combine"), compute_s, rows)])


def intervals(ends):
    return np.diff(ends)[len(ends) // 2 :]


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_step_alone_takes_the_sum_of_its_stages_and_links(lanes):
    stages = [stage(1.0, first=True), stage(2.0, travel_s=0.5), stage(3.0)]
    ends = step_ends_s(stages, lanes=lanes, in_flight=1, num_steps=3)
    np.testing.assert_allclose(ends, np.arange(1, 4) * (1.0 + 2.5 + 3.0 + 3 * 0.25))


@pytest.mark.parametrize("slowest", [0, 2, 4])
@pytest.mark.parametrize("lanes", [1, 2])
def test_a_full_pipeline_is_as_fast_as_its_slowest_stage(slowest, lanes):
    stages = [stage(3.0 if index == slowest else 1.0, first=index == 0) for index in range(5)]
    ends = step_ends_s(stages, lanes=lanes, in_flight=5 * lanes, num_steps=60)
    np.testing.assert_allclose(intervals(ends), 3.0)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_full_pipeline_of_equal_stages_takes_the_time_of_one(lanes):
    compute = [Phase(ROWS, 0.0, sent=LINK), Phase(Point(0, "dispatch"), 1.0, [Transmission(0.75)])]
    compute.append(Phase(Point(0, "combine"), 0.5, [Transmission(0.5)]))
    first = [Phase(TOKENS, 0.0, sent=LINK), *compute[1:]]
    ends = step_ends_s([*map(equal_steps, [first, *[compute] * 4])], lanes=lanes, in_flight=30, num_steps=300)
    assert np.mean(intervals(ends)) == pytest.approx(overlapped_s(compute, lanes=lanes) / lanes, rel=0.01)


def test_too_few_micro_batches_take_the_way_through_all_stages():
    stages = [stage(1.0, first=index == 0) for index in range(8)]
    ends = step_ends_s(stages, lanes=2, in_flight=4, num_steps=40)
    assert ends[-1] - ends[-5] == pytest.approx(8 * 1.25)


def test_micro_batches_that_begin_together_spread_over_the_stages():
    """Computed in rotation they would stay together, and each would take four times as long as alone."""
    layers = [Phase(Point(layer, "dispatch"), 0.25, [Transmission(0.05)]) for layer in range(4)]
    stages = [equal_steps([Phase(TOKENS if index == 0 else ROWS, 0.0, sent=LINK), *layers]) for index in range(12)]
    alone, together = (step_ends_s(stages, lanes=4, in_flight=count, num_steps=40) for count in (1, 4))
    assert together[-1] - together[-5] < 1.7 * (alone[-1] - alone[-2])


def test_a_slow_step_delays_the_steps_behind_it():
    stages = [stage(1.0, first=index == 0) for index in range(3)]
    slow = [stages[0], lambda step: stage(5.0 if step == 10 else 1.0)(step), stages[2]]
    even, uneven = (step_ends_s(given, lanes=2, in_flight=6, num_steps=30) for given in (stages, slow))
    np.testing.assert_allclose(uneven[:10], even[:10])
    np.testing.assert_allclose(uneven[10:], even[10:] + 4.0)


def test_one_stage_starts_a_step_when_the_one_before_has_ended():
    phases = [
        Phase(Point(0, "dispatch"), 1.0, [Transmission(0.5)]),
        Phase(Point(0, "combine"), 1.0, [Transmission(0.5)]),
    ]
    ends = step_ends_s([equal_steps(phases)], lanes=2, in_flight=2, num_steps=50)
    assert np.mean(intervals(ends)) == pytest.approx(overlapped_s(phases, lanes=2) / 2)
