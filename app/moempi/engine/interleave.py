"""Interleaving: while the rows of one lane are on the network, the host computes for another lane."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from moempi.comm.transfers import PendingTransfers, Wait, Waits
from moempi.layout.schedule import LaneOrder, Point


def interleave(
    lanes: Sequence[Waits[None]],
    step: Sequence[Point],
    *,
    pending: PendingTransfers,
    overlap: bool = True,
    on_queue: Callable[[int], AbstractContextManager[object]] = nullcontext,
    on_point: Callable[[int, Point], None] = lambda lane, point: None,
) -> None:
    """Resume the lanes in the order of `LaneOrder` until each has returned; blocks.

    `step` are the points of each step. If no lane can be resumed, the host waits and `pending` transfers advance.
    Without `overlap`, it waits for every transfer of a lane, and computes for another one after a whole step. Each lane
    is resumed inside `on_queue(lane)`; `on_point(lane, point)` is called at every point that a lane reaches.
    """
    order = LaneOrder(len(lanes), step, overlap=overlap)
    waits: dict[int, Wait] = {}
    while candidates := order.candidates():
        lane = _ready(candidates, waits, pending)
        waits.pop(lane, None)
        order.resume(lane)
        with on_queue(lane):
            wait = next(lanes[lane], None)
        if wait is None:
            order.end(lane)
        else:
            waits[lane] = wait
            order.wait(lane, wait.point)
            on_point(lane, wait.point)


def _ready(candidates: Sequence[int], waits: dict[int, Wait], pending: PendingTransfers) -> int:
    """The first candidate that waits for nothing, or else whose transfer is finished; blocks until there is one."""
    for lane in candidates:
        if lane not in waits or waits[lane].transfer.Test():
            return lane
    return pending.wait_for_any({lane: waits[lane].transfer for lane in candidates})
