"""The schedule: the order in which lanes reach the points where rows are on the network. Pure.

Nothing that a run computes changes this order, so every rank of a stage starts its collectives in the same order.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple, TypeVar

P = TypeVar("P")


class Point(NamedTuple):
    """A place in the forward pass where a lane waits for rows: the layer, -1 outside, and what travels."""

    layer: int
    phase: str


AGREE, ROWS, GATHER_OUTPUT, TOKENS, SENT = (Point(-1, phase) for phase in ("agree", "rows", "gather", "tokens", "sent"))
TENSOR_PHASES = ("gather", "scatter")
EXCHANGE_PHASES = {
    1: ("counts", "dispatch", "combine"),
    2: ("counts", "choices", "counts inside", "dispatch", "dispatch inside", "combine", "combine across"),
}
INSIDE_PHASES = ("counts inside", "dispatch inside", "combine")
"""The phases of the second hop of two, as of an exchange of one hop."""


def step_points(
    layers: range,
    moe_layers: Sequence[int],
    *,
    tensor: int,
    is_first: bool,
    is_last: bool,
    hops: int = 1,
    immediate: bool = False,
) -> tuple[Point, ...]:
    """The points of one step of a stage that computes `layers` and exchanges rows in one hop or two, in order.

    Where rows depart for the next stage by immediate routing, the last layer waits for no answers. A pipeline's stage
    has a last point behind what it sends, so that its turn ends with nothing left to send.
    """
    points = [AGREE if is_first else ROWS]
    for layer in layers:
        divided = TENSOR_PHASES if tensor > 1 else ()
        points.extend(
            Point(layer, phase) for phase in (*divided, *(EXCHANGE_PHASES[hops] if layer in moe_layers else divided))
        )
    if immediate:
        points.pop()
    elif not is_last and tensor > 1:
        points.append(GATHER_OUTPUT)
    if not (is_first and is_last):
        points.append(TOKENS if is_first else SENT)
    return tuple(points)


def schedule(num_lanes: int, step: Sequence[P], *, side_by_side: int) -> Iterator[tuple[int, P]]:
    """For ever: `together` lanes at a time take one step, going to each of its points in turn.

    While one of them waits at a point the others compute. A stage hands a step on once its lanes have taken it, so
    a pipeline takes few together and one stage alone takes all.
    """
    turns = [range(first, min(first + side_by_side, num_lanes)) for first in range(0, num_lanes, side_by_side)]
    for lanes in cycle(turns):
        for point in step:
            for lane in lanes:
                yield lane, point
