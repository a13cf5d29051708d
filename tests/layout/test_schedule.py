"""The schedule, and the interleaving of lanes in its order."""

from itertools import islice

import pytest

from moempi.engine.interleave import interleave
from moempi.layout.schedule import AGREE, ROWS, SENT, TOKENS, Point, schedule, step_points

FIRST, SECOND = Point(0, "counts"), Point(0, "combine")


def test_points_of_a_single_stage():
    points = step_points(range(3), (1, 2), tensor=1, is_first=True, is_last=True)
    assert points == (AGREE, *(Point(layer, phase) for layer in (1, 2) for phase in ("counts", "dispatch", "combine")))


def test_points_of_a_pipeline_end_after_the_send():
    assert step_points(range(1), (), tensor=1, is_first=True, is_last=False) == (AGREE, TOKENS)
    assert step_points(range(1), (), tensor=1, is_first=False, is_last=True) == (ROWS, SENT)
    divided = step_points(range(1), (), tensor=2, is_first=False, is_last=False)
    assert [point.phase for point in divided] == ["rows", "gather", "scatter", "gather", "scatter", "gather", "sent"]


def test_immediate_routing_has_no_last_combine():
    points = step_points(range(2), (0, 1), tensor=2, is_first=False, is_last=False, immediate=True)
    layer = ["gather", "scatter", "counts", "dispatch"]
    assert [point.phase for point in points] == ["rows", *layer, "combine", *layer, "sent"]


def test_lanes_alternate_at_each_point_and_pairs_follow_each_other():
    order = list(islice(schedule(3, (FIRST, SECOND), side_by_side=2), 8))
    assert order == [
        (0, FIRST), (1, FIRST), (0, SECOND), (1, SECOND), (2, FIRST), (2, SECOND), (0, FIRST), (1, FIRST),
    ]  # fmt: skip


def lane(name, steps, log):
    for step in range(steps):
        log.append((name, step, "to first"))
        yield FIRST
        log.append((name, step, "to second"))
        yield SECOND


def test_interleave_runs_lanes_of_different_lengths_to_their_end():
    log, reached = [], []
    lanes = [lane("a", 2, log), lane("b", 1, log)]
    interleave(lanes, (FIRST, SECOND), side_by_side=2, on_point=lambda *at: reached.append(at))
    assert [entry[0] for entry in log] == ["a", "b", "a", "b", "a", "a"]
    assert len(reached) == 6


def test_a_lane_at_another_point_is_an_error():
    with pytest.raises(RuntimeError, match="the schedule says"):
        interleave([lane("a", 1, [])], (SECOND, FIRST), side_by_side=1)
