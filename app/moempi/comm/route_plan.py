"""Route plans: the rows of one layer and lane that each rank sends, and the way back of the experts' outputs. Pure."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec import Struct

from moempi.arrays import BoolArray, IntArray


class GroupedChoices(NamedTuple):
    """The choices of one rank, (token, slot) pairs, sorted by physical expert.

    `counts` (P,) are the choices of each physical expert and `send_counts` (R,) of each rank's experts, on the host.
    `source_rows` (N,) is the token of each choice, or None if the rows are packed; `output_rows` (T, K) is the index of
    each choice in this order, and `weights` (T, K) the choices' weights, on the backend.
    """

    counts: IntArray
    send_counts: IntArray
    source_rows: Any
    output_rows: Any
    weights: Any


class Plan(Protocol):
    """The part of the plan of any exchange that its callers use."""

    @property
    def expert_counts(self) -> IntArray:
        """The rows of each hosted expert."""


class RoutePlan(NamedTuple):
    """The plan of one hop: rows are dispatched by it, and the experts' outputs return in the opposite direction.

    `send_counts` and `recv_counts` (R,) are the rows dispatched to and from each rank, `expert_counts` the rows of each
    hosted expert. `source_rows` (N,) is the token of each dispatched row, or None, `output_rows` (T, K) the index of
    each choice's output among the returned rows, `weights` (T, K) the choices' weights; these three are the backend's.
    Rows are received in the order of the source rank, then of the expert. `by_expert` permutes them to expert order and
    `by_source` back; both are None if the orders are the same.
    """

    layer: int
    send_counts: IntArray
    recv_counts: IntArray
    expert_counts: IntArray
    source_rows: Any
    output_rows: Any
    weights: Any
    by_expert: IntArray | None
    by_source: IntArray | None


class TwoHopPlan(Struct, frozen=True):
    """The plan of two hops: the rows that are sent to nodes, and the plan `inside` this node of the received rows.

    `send_counts` and `recv_counts` (R,) are the rows that are sent to and from each rank across nodes. `output_rows`
    (T, N) is the index among the returned rows of the row from each node of a token, `present` (T, N) is 1, or 0 if the
    token has fewer nodes. The sent rows are of `tokens` (S,); `chosen` (M, K) are the choices of the received rows that
    are on this node.
    """

    layer: int
    send_counts: IntArray
    recv_counts: IntArray
    output_rows: Any
    present: Any
    inside: RoutePlan
    tokens: IntArray
    chosen: BoolArray

    @property
    def expert_counts(self) -> IntArray:
        """The rows of each hosted expert."""
        return self.inside.expert_counts


def make_plan(layer: int, choices: GroupedChoices, counts_here: IntArray) -> RoutePlan:
    """The plan of grouped choices, given the counts_here (R, experts hosted here) that this rank has received."""
    by_expert, by_source = expert_order(counts_here)
    num_ranks, num_hosted = counts_here.shape
    return RoutePlan(
        layer=layer,
        send_counts=choices.send_counts,
        recv_counts=counts_here[:, 0] if num_hosted == 1 else counts_here.sum(axis=1),
        expert_counts=counts_here[0] if num_ranks == 1 else counts_here.sum(axis=0),
        source_rows=choices.source_rows,
        output_rows=choices.output_rows,
        weights=choices.weights,
        by_expert=by_expert,
        by_source=by_source,
    )


def rows_by_rank(counts: IntArray, bounds: IntArray) -> IntArray:
    """The rows for each rank (R,), given the rows of each physical expert (P,).

    Rank r hosts the physical experts from bounds[r] up to bounds[r + 1] (R + 1,).
    """
    before = np.zeros(len(counts) + 1, np.int64)
    counts.cumsum(out=before[1:])
    first_rows: IntArray = before[bounds]
    return first_rows[1:] - first_rows[:-1]


def expert_order(counts: IntArray) -> tuple[IntArray | None, IntArray | None]:
    """Permutations from source order to expert order and back, given counts (R, experts hosted here).

    Both are None when the orders are the same: fewer than two hosted experts, or rows from one source only.
    """
    if counts.shape[1] < 2 or np.count_nonzero(counts.sum(axis=1)) < 2:
        return None, None
    flat = counts.reshape(-1)
    begins = (np.cumsum(flat) - flat).reshape(counts.shape).T.reshape(-1)
    sizes = counts.T.reshape(-1)
    ends = np.cumsum(sizes)
    by_expert = np.repeat(begins - (ends - sizes), sizes) + np.arange(ends[-1])
    by_source = np.empty_like(by_expert)
    by_source[by_expert] = np.arange(len(by_expert))
    return by_expert, by_source
