"""The points of a step, and the order in which lanes are resumed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moempi.layout.schedule import AGREE, GATHER_OUTPUT, HEAD_POINTS, ROWS, TOKENS, LaneOrder, Point, step_points

DISPATCH, COMBINE = Point(0, "dispatch"), Point(0, "combine")
STEP = (AGREE, DISPATCH, COMBINE)


def test_points_of_a_single_stage():
    points = step_points(range(3), (1, 2), tensor=1, is_first=True, head=1)
    assert points == (AGREE, *(Point(layer, phase) for layer in (1, 2) for phase in ("dispatch", "combine")))


def test_points_of_a_pipeline_begin_with_what_another_stage_sends():
    assert step_points(range(1), (), tensor=1, is_first=True) == (TOKENS, AGREE)
    assert step_points(range(1), (), tensor=1, is_first=False, head=1) == (ROWS,)


def test_a_tensor_group_gathers_what_it_sends_or_samples():
    divided = tuple(Point(0, phase) for phase in ("gather", "scatter", "gather", "scatter"))
    assert step_points(range(1), (), tensor=2, is_first=False) == (ROWS, *divided, GATHER_OUTPUT)
    assert step_points(range(1), (), tensor=2, is_first=False, head=2) == (ROWS, *divided, *HEAD_POINTS[1:])


@pytest.mark.parametrize("tensor", [1, 2])
def test_tensor_groups_that_divide_a_head_together_first_exchange_their_numbers_of_rows(tensor):
    points = step_points(range(1), (), tensor=tensor, is_first=True, head=4)
    assert points[0] == AGREE
    assert points[-4:] == HEAD_POINTS
    assert [point.phase for point in HEAD_POINTS] == ["head counts", "head rows", "logits", "sampled"]


@given(
    rounds=st.lists(st.lists(st.integers(1, 4), min_size=2, max_size=2), min_size=1, max_size=4), first=st.booleans()
)
def test_lanes_that_score_different_numbers_of_rows_do_not_hold_each_other_up(rounds, first):
    """rounds[step][lane] times a lane reaches the points of rows and logits in a step."""
    step = step_points(range(1), (), tensor=1, is_first=True, head=2)
    order, left = LaneOrder(2, step), []
    for lane in range(2):
        points = [point for counts in rounds for point in (*step[:2], *step[2:4] * counts[lane], step[-1])]
        left.append(points)
    while candidates := order.candidates():
        lane = candidates[0 if first else -1]
        order.resume(lane)
        if left[lane]:
            order.wait(lane, left[lane].pop(0))
        else:
            order.end(lane)
    assert left == [[], []]


def test_immediate_routing_has_no_last_combine():
    points = step_points(range(2), (0, 1), tensor=2, is_first=False, immediate=True)
    layer = ["gather", "scatter", "dispatch"]
    assert [point.phase for point in points] == ["rows", *layer, "combine", *layer]


def test_the_lane_whose_step_began_first_is_resumed_first_and_passed_over_if_it_is_not_ready():
    order = LaneOrder(3, STEP)
    assert order.candidates() == [0]  # the first step begins in order
    for lane in range(3):
        order.resume(lane)
        order.wait(lane, DISPATCH)
    assert order.candidates() == [0, 1, 2]
    order.resume(1)  # 0 is not ready
    order.wait(1, COMBINE)
    assert order.candidates() == [0, 2]  # the step of 1 ends after that of 0
    for point in (COMBINE, AGREE):
        order.resume(0)
        order.wait(0, point)
    assert order.candidates() == [1, 2, 0]  # lane 0 has begun its next step


@pytest.mark.parametrize("point", [AGREE, TOKENS, ROWS, COMBINE])
def test_a_lane_leaves_the_ends_of_a_step_after_the_lane_before_it(point):
    order = LaneOrder(2, STEP)
    for lane in range(2):
        order.resume(lane)
        order.wait(lane, DISPATCH)
    order.resume(1)
    order.wait(1, point)
    assert order.candidates() == [0]  # though lane 1 has arrived first
    order.resume(0)
    order.wait(0, point)
    assert order.candidates() == [0]
    order.resume(0)
    order.wait(0, DISPATCH)
    assert order.candidates() == ([1, 0] if point == COMBINE else [0, 1])


def test_a_lane_that_has_ended_is_not_waited_for():
    order = LaneOrder(3, STEP)
    order.resume(0)
    order.end(0)
    assert order.candidates() == [1]
    order.resume(1)
    order.wait(1, COMBINE)
    order.resume(2)
    order.end(2)
    assert order.candidates() == [1]
    order.resume(1)
    order.end(1)
    assert order.candidates() == []


def test_without_overlap_a_lane_takes_a_whole_step_before_another_is_resumed():
    order, resumed = LaneOrder(2, STEP, overlap=False), []
    index = [2, 2]
    for _ in range(9):
        (lane,) = order.candidates()[:1]
        assert order.candidates() == [lane] or STEP[index[lane]] == COMBINE or index[lane] == 0
        order.resume(lane)
        index[lane] = (index[lane] + 1) % 3
        order.wait(lane, STEP[index[lane]])
        resumed.append((lane, STEP[index[lane]].phase))
    assert resumed[2:8] == [(lane, phase) for lane in (0, 1) for phase in ("dispatch", "combine", "agree")]


@given(
    steps=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    tensor=st.integers(1, 2),
    is_first=st.booleans(),
    head=st.integers(0, 2),
    choices=st.lists(st.integers(0, 3), min_size=400, max_size=400),
    overlap=st.booleans(),
)
def test_steps_begin_and_end_in_the_same_order_whatever_arrives_first(steps, tensor, is_first, head, choices, overlap):
    points = step_points(range(3), (1, 2), tensor=tensor, is_first=is_first, head=head * tensor)
    order = LaneOrder(len(steps), points, overlap=overlap)
    at, left = [len(points) - 1] * len(steps), [count * len(points) for count in steps]
    begun, ended = [], []
    for choice in choices:
        candidates = order.candidates()
        if not candidates:
            break
        lane = candidates[choice % len(candidates)]
        ended += [lane] if at[lane] == len(points) - 1 else []
        begun += [lane] if at[lane] == 0 else []
        order.resume(lane)
        if not left[lane]:
            order.end(lane)
            continue
        at[lane], left[lane] = (at[lane] + 1) % len(points), left[lane] - 1
        order.wait(lane, points[at[lane]])
    assert not order.candidates()
    rounds = [[lane for lane, count in enumerate(steps) if count >= number] for number in range(max(steps) + 1)]
    assert ended == [lane for lanes in rounds for lane in lanes]
    assert begun == [lane for lanes in rounds[1:] for lane in lanes]
