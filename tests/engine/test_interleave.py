"""Lanes are resumed as their transfers are finished, and the host waits only if no lane can be resumed."""

from contextlib import contextmanager

import pytest

from moempi.backend.cpu.backend import NumpyBackend
from moempi.comm.transfers import PendingTransfers, Transfers
from moempi.engine.interleave import interleave
from moempi.layout.schedule import AGREE, Point

A, B = Point(0, "dispatch"), Point(0, "combine")


class Clock:
    """Transfers that are finished after a number of looks at any of them."""

    def __init__(self):
        self.pending = PendingTransfers()
        backend = NumpyBackend(precision="float32", progress=self.pending.progress)
        self.transfers = Transfers(backend, self.pending)
        self.looks = 0

    def transfer(self, looks):
        clock, end = self, self.looks + looks

        class Request:
            def Test(self):  # noqa: N802
                clock.looks += 1
                return clock.looks > end

        def steps():
            yield Request()

        return self.transfers.start(steps())


def lane_of(clock, steps, *, name, log, looks=0, points=(A, B)):
    """A lane that takes `steps` whole steps; it logs what it computes between the points."""
    for step in range(steps):
        for point in points:
            log.append((name, step, point))
            yield from clock.transfer(looks).received(point)


def run(names, steps, *, looks=None, points=(A, B), overlap=True):
    """What the lanes log, and the points that they reach."""
    clock, log, reached = Clock(), [], []
    looks = looks or dict.fromkeys(names, 0)
    lanes = [lane_of(clock, steps, name=name, log=log, looks=looks[name], points=points) for name in names]
    on_point = lambda lane, point: reached.append((lane, point))  # noqa: E731
    interleave(lanes, points, pending=clock.pending, overlap=overlap, on_point=on_point)
    return log, reached, clock


def test_without_lanes_nothing_is_resumed():
    assert run("", 1)[:2] == ([], [])


def test_one_lane_runs_to_its_end():
    log, reached, _ = run("x", 2)
    assert reached == [(0, A), (0, B)] * 2
    assert [entry[1:] for entry in log] == [(0, A), (0, B), (1, A), (1, B)]


def test_of_lanes_whose_rows_have_arrived_the_one_runs_whose_step_began_first():
    log, _, _ = run("xy", 2)
    assert [f"{name}{step}" for name, step, point in log if point == A] == ["x0", "y0", "x1", "y1"]
    assert [f"{name}{step}" for name, step, _ in log] == ["x0", "y0", "x0", "x1", "y0", "y1", "x1", "y1"]


def test_a_lane_whose_rows_have_not_arrived_is_passed_over():
    middle = Point(0, "gather")
    log, _, _ = run("xy", 1, looks={"x": 4, "y": 0}, points=(A, middle, B))
    assert log == [("x", 0, A), ("y", 0, A), ("y", 0, middle), ("y", 0, B), ("x", 0, middle), ("x", 0, B)]


def test_a_step_begins_after_the_step_of_the_lane_before_it_has_ended():
    log, _, _ = run("xy", 2, looks={"x": 9, "y": 0})
    assert log.index(("x", 1, A)) < log.index(("y", 1, A))


def test_without_overlap_lanes_take_whole_steps():
    log, _, _ = run("xy", 2, looks={"x": 9, "y": 0}, points=(AGREE, A, B), overlap=False)
    computed = [entry for entry in log if entry[2] != AGREE]
    assert computed == [(name, step, point) for step in (0, 1) for name in "xy" for point in (A, B)]


def test_the_host_waits_for_whichever_rows_arrive_first_and_the_lane_has_the_cause():
    _, _, clock = run("xy", 1, looks={"x": 30, "y": 20})
    assert clock.looks > 30
    assert clock.transfers.waits["exchange"] > 0.0
    assert clock.transfers.waits["pipeline"] == clock.transfers.waits["idle"] == 0.0


def test_a_lane_computes_on_its_queue_and_its_point_is_reported_after_that():
    log, clock = [], Clock()

    @contextmanager
    def on_queue(lane):
        log.append(("enter", lane))
        yield
        log.append(("leave", lane))

    interleave(
        [lane_of(clock, 1, name=name, log=log, points=(A,)) for name in (0, 1)],
        (A,),
        pending=clock.pending,
        on_queue=on_queue,
        on_point=lambda lane, point: log.append((lane, point)),
    )
    first, second = ([("enter", lane), (lane, 0, A), ("leave", lane), (lane, A)] for lane in (0, 1))
    ends = [(what, lane) for lane in (0, 1) for what in ("enter", "leave")]
    assert log == [*first, *second, *ends]


def test_an_error_of_a_lane_passes_through():
    clock = Clock()

    def failing():
        yield from clock.transfer(0).received(A)
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        interleave([lane_of(clock, 9, name="x", log=[]), failing()], (A, B), pending=clock.pending)
