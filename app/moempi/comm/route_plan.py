"""Route plans: where each row of one layer and lane goes, and how the experts' outputs come back. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moempi.arrays import IntArray


@dataclass(frozen=True, slots=True)
class GroupedChoices:
    """The choices of one rank, (token, slot) pairs, sorted by physical expert.

    `counts` (P,) choices of each physical expert, on the host; `source_rows` (N,) the token of each choice;
    `output_rows` (T, K) the place of each choice in this order; `weights` (T, K). The arrays but `counts` are the
    backend's.
    """

    counts: IntArray
    source_rows: Any
    output_rows: Any
    weights: Any


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """One hop: read forwards it dispatches rows to their experts, read backwards it combines the experts' outputs.

    `send_counts` and `recv_counts` (R,) are rows to and from each rank, `expert_counts` the rows of each hosted expert.
    `source_rows` (N,) is the token of each row that is sent, `output_rows` (T, K) the row of the returned outputs that
    answers each choice, `weights` (T, K) its factor; these three are the backend's arrays. Rows arrive ordered by
    source rank, then expert; `by_expert` permutes them to expert order and `by_source` back. Both are None where the
    orders are the same.
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


@dataclass(frozen=True, slots=True)
class TwoHopPlan:
    """Two hops: the rows that cross to other nodes, and the plan `inside` this rank's node of the rows that arrived.

    `send_counts` and `recv_counts` (R,) are rows to and from each rank; `source_rows` (M,) is the token of each row
    that is sent, `output_rows` (T, N) the returned row of each of a token's nodes, and `present` (T, N) is 1, or 0
    where a token has fewer nodes.
    """

    layer: int
    send_counts: IntArray
    recv_counts: IntArray
    source_rows: Any
    output_rows: Any
    present: Any
    inside: RoutePlan

    @property
    def expert_counts(self) -> IntArray:
        """The rows of each hosted expert."""
        return self.inside.expert_counts


def make_plan(layer: int, choices: GroupedChoices, counts_here: IntArray, *, bounds: IntArray) -> RoutePlan:
    """The plan of grouped choices, given counts_here (R, experts hosted here) that all ranks sent to this one.

    Rank r hosts the physical experts from bounds[r] up to bounds[r + 1] (R + 1,).
    """
    by_expert, by_source = expert_order(counts_here)
    before = np.concatenate([[0], np.cumsum(choices.counts)])
    return RoutePlan(
        layer=layer,
        send_counts=np.diff(before[bounds]),
        recv_counts=counts_here.sum(axis=1),
        expert_counts=counts_here.sum(axis=0),
        source_rows=choices.source_rows,
        output_rows=choices.output_rows,
        weights=choices.weights,
        by_expert=by_expert,
        by_source=by_source,
    )


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
