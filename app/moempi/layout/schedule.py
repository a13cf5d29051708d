"""The schedule: the points at which a lane waits for rows, and the order in which waiting lanes are resumed. Pure."""

from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A point of the forward pass at which a lane waits: layer, -1 outside layers, and phase of communication."""

    layer: int
    phase: str


TOKENS, AGREE, ROWS, GATHER_OUTPUT = (Point(-1, phase) for phase in ("tokens", "agree", "rows", "gather"))
BEGIN_POINTS = (TOKENS, AGREE, ROWS)
"""The points before the first layer."""
HEAD_POINTS = HEAD_COUNTS, HEAD_ROWS, LOGITS, SAMPLED = tuple(
    Point(-1, phase) for phase in ("head counts", "head rows", "logits", "sampled")
)
TENSOR_PHASES = ("gather", "scatter")
EXCHANGE_PHASES = ("dispatch", "combine")


def step_points(
    layers: range,
    moe_layers: Sequence[int],
    *,
    tensor: int,
    is_first: bool,
    head: int = 0,
    immediate: bool = False,
    half_layers: Sequence[int] = (),
) -> tuple[Point, ...]:
    """The points of one step of a stage that computes `layers`, in order.

    `head` ranks divide the LM head of the last stage; 0: of another stage. The `half_layers` have an attention alone,
    or a feed-forward alone.

    With `immediate`, the last layer has no combine, because its outputs go to the next stage. In a pipeline, the first
    point of the first stage follows the step before: there it waits for the tokens that the last stage samples.
    """
    points = [ROWS] if not is_first else [AGREE] if head else [TOKENS, AGREE]
    for layer in layers:
        divided = TENSOR_PHASES if tensor > 1 else ()
        first = () if layer in half_layers else divided
        last = EXCHANGE_PHASES if layer in moe_layers else divided
        points.extend(Point(layer, phase) for phase in (*first, *last))
    if immediate:
        points.pop()
    elif head:
        points.extend(head_points(tensor=tensor, head=head))
    elif tensor > 1:
        points.append(GATHER_OUTPUT)
    return tuple(points)


def head_points(*, tensor: int, head: int) -> tuple[Point, ...]:
    """The points of an LM head that `head` ranks divide: a tensor group of `tensor` ranks, or several groups.

    Several groups do not know each other's numbers of rows and exchange them first. A lane that scores reaches
    HEAD_ROWS and LOGITS many times in a step: its last point is SAMPLED, also without a tensor group.
    """
    if head == 1:
        return ()
    return HEAD_POINTS if head > tensor else HEAD_POINTS[1:]


class LaneOrder:
    """The order in which lanes are resumed that take steps through the points of `step`.

    The lane whose step began first is resumed first, unless its rows have not arrived: so a micro-batch is not held up
    by those behind it, and they spread over the stages of a pipeline. Steps begin and end in the same order on all
    ranks: a lane leaves the points before the first layer, and the last point of a step, after the lane before it did.
    Without `overlap`, a lane takes a whole step before another lane is resumed. Every lane begins at the last point.
    """

    def __init__(self, num_lanes: int, step: Sequence[Point], *, overlap: bool = True) -> None:
        self._first_point = step[0] if step[0] in BEGIN_POINTS else None
        self._last_point = step[-1]
        self._running = list(range(num_lanes))
        self._points = [step[-1]] * num_lanes
        self._next_to_leave = dict.fromkeys((*BEGIN_POINTS, step[-1]), 0)
        self._resumed = num_lanes - 1
        self._overlap = overlap
        self._in_step = False

    def candidates(self) -> list[int]:
        """The lanes that may be resumed as soon as their rows have arrived, in the order of preference.

        Empty only if all lanes have ended.
        """
        if not self._overlap:
            first = self._resumed if self._in_step else self._following(self._resumed)
            return [first] if self._running else []
        first = self._next_to_leave[self._last_point]
        rotation = [lane for lane in self._running if lane >= first] + [lane for lane in self._running if lane < first]
        return [lane for lane in rotation if self._next_to_leave.get(self._points[lane], lane) == lane]

    def resume(self, lane: int) -> None:
        """Resume a candidate: it leaves its point."""
        if self._points[lane] in self._next_to_leave:
            self._next_to_leave[self._points[lane]] = self._following(lane)
        self._resumed = lane

    def wait(self, lane: int, point: Point) -> None:
        """Let a resumed lane wait at its next point."""
        self._points[lane] = point
        self._in_step = not self._overlap and point != self._first_point

    def end(self, lane: int) -> None:
        """A resumed lane takes no more steps."""
        following = self._following(lane)
        self._running.remove(lane)
        self._in_step = False
        for point, next_lane in self._next_to_leave.items():
            if next_lane == lane:
                self._next_to_leave[point] = following

    def _following(self, lane: int) -> int:
        """The first running lane after this one, in rotation; the lane itself if no other runs."""
        return next((other for other in self._running if other > lane), self._running[0] if self._running else lane)
