"""Gathering: experts that a token uses together, or that are used from one node, onto the same node. Pure.

A token crosses once to each other node that hosts any of its experts (two hops; with one hop each choice is a token of
its own). Pairs of experts on different nodes change places, best pairs first, while the cost falls: crossings, and a
price on uneven nodes. How the cost changes is known for all pairs at once, from three products of matrices.

Layers are placed one by one: a token's rows return to its home after each, so where another layer's experts stand
makes no difference to what this one sends.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float64Array, IntArray

MOST_ROUNDS = 200
LEAST_GAIN = 1e-9


@dataclass(frozen=True, slots=True)
class ExpertUsage:
    """Which experts tokens use: `used` (T, E) float32 0 or 1, and the node (T,) that each token is at home on."""

    used: npt.NDArray[np.float32]
    homes: IntArray

    @classmethod
    def from_choices(cls, experts: IntArray, homes: IntArray, num_experts: int) -> "ExpertUsage":
        """Those of chosen experts (T, K) and nodes (T,)."""
        used = np.zeros((len(experts), num_experts), np.float32)
        used[np.arange(len(experts))[:, None], experts] = 1
        return cls(used, homes)


def co_locate(usage: ExpertUsage, start: IntArray, *, ranks_of_node: IntArray, imbalance_price: float) -> IntArray:
    """The node of each expert (E,) after exchanges that begin at `start` (E,), with as many experts on each node.

    `evenness` is the price of uneven nodes, in crossings: with load l on a node of r ranks, the sum of l^2 / r over its
    least possible value.
    """
    nodes = start.copy()
    load = usage.used.sum(axis=0).astype(np.float64)
    price = imbalance_price * ranks_of_node.sum() / max(load.sum(), 1.0)
    cost = _cost(usage, nodes, load, ranks_of_node, price)
    for _ in range(MOST_ROUNDS):
        change = _changes(usage, nodes, load, ranks_of_node, price)
        pairs = _disjoint(change)
        while pairs:
            tried = nodes.copy()
            for one, other in pairs:
                tried[[one, other]] = nodes[[other, one]]
            tried_cost = _cost(usage, tried, load, ranks_of_node, price)
            if tried_cost < cost - LEAST_GAIN:
                break
            pairs = pairs[: len(pairs) // 2]
        if not pairs:
            return nodes
        nodes, cost = tried, tried_cost
    return nodes


def clusters(usage: ExpertUsage, slots_per_node: IntArray) -> IntArray:
    """A start for `gather` (E,): each node in turn takes the busiest expert left, then those most used with its own."""
    together = usage.used.T @ usage.used
    nodes = np.full(len(together), -1)
    for node, places in enumerate(slots_per_node.tolist()):
        for _ in range(places):
            with_own = together[:, nodes == node].sum(axis=1)
            score = with_own if with_own.any() else np.diag(together)
            nodes[np.argmax(np.where(nodes < 0, score, -1.0))] = node
    return nodes


def num_node_transfers(usage: ExpertUsage, nodes: IntArray, num_nodes: int) -> int:
    """How many times tokens cross to another node."""
    there = usage.used @ np.eye(num_nodes, dtype=np.float32)[nodes] > 0
    there[np.arange(len(there)), usage.homes] = False
    return int(np.count_nonzero(there))


def _cost(usage: ExpertUsage, nodes: IntArray, load: Float64Array, ranks_of_node: IntArray, price: float) -> float:
    on_node = np.bincount(nodes, load, minlength=len(ranks_of_node))
    return num_node_transfers(usage, nodes, len(ranks_of_node)) + price * float((on_node**2 / ranks_of_node).sum())


def _changes(
    usage: ExpertUsage, nodes: IntArray, load: Float64Array, ranks_of_node: IntArray, price: float
) -> Float64Array:
    """How the cost changes when two experts change nodes (E, E)."""
    num_nodes, tokens = len(ranks_of_node), np.arange(len(usage.homes))
    counts = usage.used @ np.eye(num_nodes, dtype=np.float32)[nodes]
    new = (counts == 0).astype(np.float32)
    new[tokens, usage.homes] = 0
    alone = (counts == 1).astype(np.float32)
    alone[tokens, usage.homes] = 0
    # What a token gains where its expert was alone on the node, and pays where the expert comes as the first one.
    leaving = usage.used * alone[:, nodes]
    moving = (usage.used.T @ new)[:, nodes].astype(np.float64) - leaving.sum(axis=0, dtype=np.float64)[:, None]
    # A token that uses both stays as it is: take back what it was counted to gain.
    both = (leaving.T @ usage.used).astype(np.float64)
    change: Float64Array = moving + moving.T + both + both.T
    on_node = np.bincount(nodes, load, minlength=num_nodes)
    heavier = load[None, :] - load[:, None]
    left = ((on_node[nodes][:, None] + heavier) ** 2 - on_node[nodes][:, None] ** 2) / ranks_of_node[nodes][:, None]
    change += price * (left + left.T)
    change[nodes[:, None] == nodes[None, :]] = 0
    return change


def _disjoint(change: Float64Array) -> list[tuple[int, int]]:
    """Pairs that lower the cost, the best first, no expert twice."""
    rows, columns = np.nonzero(np.triu(change < -LEAST_GAIN))
    order = np.argsort(change[rows, columns], kind="stable")
    pairs: list[tuple[int, int]] = []
    taken: set[int] = set()
    for one, other in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if not taken & {one, other}:
            taken |= {one, other}
            pairs.append((one, other))
    return pairs
