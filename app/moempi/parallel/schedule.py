"""The schedule: the order in which lanes reach the points where rows are on the network. Pure.

Nothing that a run computes changes this order, so every rank of a group starts its collectives in the same order.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle
from typing import NamedTuple


class Point(NamedTuple):
    """A place in the forward pass where a lane waits for rows: the layer and what travels."""

    layer: int
    phase: str


STEP_END = Point(-1, "agree")
MOE_PHASES = ("counts", "dispatch", "combine")


def points(moe_layers: Iterable[int]) -> tuple[Point, ...]:
    """The points of one step, in order; the last is where the ranks learn whether any work is left."""
    return (*(Point(layer, phase) for layer in moe_layers for phase in MOE_PHASES), STEP_END)


def schedule(num_lanes: int, step: Sequence[Point]) -> Iterator[tuple[int, Point]]:
    """For ever: at each point of the step in turn, every lane goes there in turn."""
    for point in cycle(step):
        for lane in range(num_lanes):
            yield lane, point
