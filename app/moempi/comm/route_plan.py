"""The route plan: where each row of one layer and lane goes, and the way back. Pure."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moempi.arrays import IntArray


@dataclass(frozen=True, slots=True)
class RoutePlan:
    """Read forwards it dispatches rows to their experts, read backwards it combines the answers.

    A choice is one (token, slot) pair; its home is the rank that holds the token. `send_counts` and `recv_counts`
    (R,) are rows to and from each rank. `source_rows` is the token of each outgoing row and `places` (T, K) where the
    answer to each choice comes back, both on the backend's machine, as are `weights` (T, K). Rows arrive ordered by
    source rank, then expert; `by_expert` takes them to expert order and `by_source` back; None where they are the
    same. `expert_counts` are the rows of each hosted expert. With two hops these are of the first, and `inside` is the
    plan of the second.
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
    inside: "RoutePlan | None" = None

    @property
    def second(self) -> "RoutePlan":
        """The plan of the second hop; ValueError if there is none."""
        if self.inside is None:
            raise ValueError("a plan of one hop has no second")
        return self.inside


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
