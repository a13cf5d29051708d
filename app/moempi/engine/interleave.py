"""Interleaving: lanes are resumed one after another, so that one computes while rows of others are on the network."""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext

from moempi.layout.schedule import Point, schedule


def interleave(
    lanes: Sequence[Generator[Point, None, None]],
    step: Sequence[Point],
    *,
    side_by_side: int,
    on_queue: Callable[[int], AbstractContextManager[object]] = nullcontext,
    on_point: Callable[[int, Point], None] = lambda lane, point: None,
) -> None:
    """Resume the lanes in the order of the schedule until each has returned.

    `step` are the points of one step; `side_by_side` lanes take a step at the same time. Each lane is resumed inside
    `on_queue(lane)`, and `on_point` is called with every lane and point. Raises RuntimeError when a lane is at another
    point than the schedule says: its ranks would no longer start their collectives in the same order.
    """
    running = dict(enumerate(lanes))
    for lane, point in schedule(len(lanes), step, side_by_side=side_by_side):
        if lane in running:
            with on_queue(lane):
                actual = next(running[lane], None)
            if actual is None:
                del running[lane]
            elif actual != point:
                raise RuntimeError(f"lane {lane} is at {actual}, the schedule says {point}")
            else:
                on_point(lane, point)
        if not running:
            return
