"""Lanes are resumed in the order of the schedule, and a lane at another point is an error."""

from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moempi.engine.interleave import interleave
from moempi.layout.schedule import Point, step_points

A, B = Point(0, "dispatch"), Point(0, "combine")


def lane_of(steps, points=(A, B), *, log=None, name=None):
    """A lane that takes `steps` whole steps; it logs what it computes between the points."""
    for step in range(steps):
        for point in points:
            if log is not None:
                log.append((name, step, point))
            yield point


def run(lanes, points, *, side_by_side):
    """The lanes in the order that they were resumed, and the points that they reached."""
    resumed, reached = [], []

    @contextmanager
    def on_queue(lane):
        resumed.append(lane)
        yield

    interleave(
        lanes,
        points,
        side_by_side=side_by_side,
        on_queue=on_queue,
        on_point=lambda lane, point: reached.append((lane, point)),
    )
    return resumed, reached


def test_without_lanes_nothing_is_resumed():
    assert run([], (A, B), side_by_side=1) == ([], [])


def test_one_lane_runs_to_its_end():
    resumed, reached = run([lane_of(2)], (A, B), side_by_side=1)
    assert reached == [(0, A), (0, B)] * 2
    assert resumed == [0] * 5  # the last time, it returns


def test_lanes_side_by_side_go_from_point_to_point_together():
    log = []
    interleave([lane_of(2, log=log, name=name) for name in "xy"], (A, B), side_by_side=2)
    assert log == [(name, step, point) for step in (0, 1) for point in (A, B) for name in "xy"]


def test_lanes_one_at_a_time_take_whole_steps():
    log = []
    interleave([lane_of(2, log=log, name=name) for name in "xy"], (A, B), side_by_side=1)
    assert log == [(name, step, point) for step in (0, 1) for name in "xy" for point in (A, B)]


def test_an_odd_lane_takes_its_step_alone():
    log = []
    interleave([lane_of(1, log=log, name=name) for name in "xyz"], (A, B), side_by_side=2)
    assert [(name, point) for name, _, point in log] == [
        *(("x", A), ("y", A), ("x", B), ("y", B)),
        *(("z", A), ("z", B)),
    ]


def test_a_lane_that_has_returned_is_not_resumed_and_the_others_go_on():
    resumed, reached = run([lane_of(1), lane_of(3), lane_of(0)], (A, B), side_by_side=3)
    assert [lane for lane, _ in reached] == [0, 1, 0, 1, 1, 1, 1, 1]
    assert (resumed.count(0), resumed.count(1), resumed.count(2)) == (3, 7, 1)


def test_a_lane_computes_on_its_queue_and_its_point_is_reported_after_that():
    log = []

    @contextmanager
    def on_queue(lane):
        log.append(("enter", lane))
        yield
        log.append(("leave", lane))

    interleave(
        [lane_of(1, (A,), log=log, name=name) for name in (0, 1)],
        (A,),
        side_by_side=2,
        on_queue=on_queue,
        on_point=lambda lane, point: log.append((lane, point)),
    )
    first, second = ([("enter", lane), (lane, 0, A), ("leave", lane), (lane, A)] for lane in (0, 1))
    ends = [(what, lane) for lane in (0, 1) for what in ("enter", "leave")]
    assert log == [*first, *second, *ends]


@pytest.mark.parametrize(
    ("points", "line"),
    [
        ((A, A), f"lane 1 is at {A}, the schedule says {B}"),
        ((B, A), f"lane 1 is at {B}, the schedule says {A}"),
        ((A, B, Point(1, "dispatch")), f"lane 1 is at {Point(1, 'dispatch')}, the schedule says {A}"),
        ((A, Point(1, "combine")), f"lane 1 is at {Point(1, 'combine')}, the schedule says {B}"),
    ],
)
def test_a_lane_at_another_point_than_the_schedule_is_an_error(points, line):
    reached = []
    with pytest.raises(RuntimeError) as error:
        interleave(
            [lane_of(3), lane_of(1, points)],
            (A, B),
            side_by_side=2,
            on_point=lambda lane, point: reached.append((lane, point)),
        )
    assert str(error.value) == line
    assert reached[-1][0] == 0  # a wrong point is not reported


def test_an_error_of_a_lane_passes_through():
    def failing():
        yield A
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        interleave([lane_of(9), failing()], (A, B), side_by_side=2)


@settings(deadline=None)
@given(
    steps=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    side_by_side=st.integers(1, 6),
    tensor=st.integers(1, 2),
    hops=st.integers(1, 2),
)
def test_lanes_side_by_side_stay_together_until_they_end(steps, side_by_side, tensor, hops):
    points = step_points(range(3), (1, 2), tensor=tensor, is_first=True, is_last=True, hops=hops)
    _, reached = run([lane_of(count, points) for count in steps], points, side_by_side=side_by_side)
    ends = [count * len(points) for count in steps]
    passed = [0] * len(steps)
    for lane, point in reached:
        assert point == points[passed[lane] % len(points)]
        passed[lane] += 1
        first = lane // side_by_side * side_by_side
        for other in range(first, min(first + side_by_side, len(steps))):
            if other != lane and passed[other] < ends[other]:
                assert passed[other] == passed[lane] - (other > lane)
    assert passed == ends
