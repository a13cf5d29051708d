"""The schedule: the order in which lanes reach the points at which they wait for rows. Pure.

The order does not depend on any computed value, so all ranks of a stage start their collectives in the same order.
"""

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple, TypeVar

P = TypeVar("P")


class Point(NamedTuple):
    """A point of the forward pass at which a lane waits: layer, -1 outside layers, and phase of communication."""

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

    With `immediate`, the last layer has no combine, because its outputs go to the next stage. In a pipeline, the last
    point of a stage follows its send.
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
    """Yield (lane, point) endlessly: `side_by_side` lanes at a time take one step, and alternate at each of its points.

    While one lane waits at a point, the others compute. A stage sends a step on when its lanes have completed it, so a
    pipeline interleaves few lanes and a single stage interleaves all.
    """
    rounds = [range(first, min(first + side_by_side, num_lanes)) for first in range(0, num_lanes, side_by_side)]
    for lanes in cycle(rounds):
        for point in step:
            for lane in lanes:
                yield lane, point
