"""Interleaving: lanes are resumed in turn, so that one computes while the rows of others are on the network."""

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
    """Resume the lanes in the order of `schedule` until each has returned.

    `step` lists the points of one step; `side_by_side` lanes take a step at the same time. Each lane is resumed inside
    `on_queue(lane)`; `on_point(lane, point)` is called at every point that a lane reaches. Raises RuntimeError if a
    lane is at another point than the schedule: its ranks would start their collectives in different orders.
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
