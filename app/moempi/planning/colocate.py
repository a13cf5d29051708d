"""Co-location: experts that a token uses together, or that one node's tokens use, on the same node. Pure.

With two hops a token is transferred once to each other node that hosts any of its experts; with one hop each choice
counts as a token of its own. Starting from an assignment of experts to nodes, pairs of experts on different nodes are
swapped, best pairs first, while the cost falls. The cost is the number of node transfers plus a price on uneven load of
nodes; three matrix products give its change for all pairs at once.

Layers are placed independently: a token's rows return to its home after each layer, so the placement of one layer does
not change the transfers of another.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float64Array, IntArray

MAX_ROUNDS = 200
MIN_GAIN = 1e-9


@dataclass(frozen=True, slots=True)
class ExpertUsage:
    """Experts that tokens use: `used` (T, E) float32, 0 or 1, and the node of each token's home, `home_nodes` (T,)."""

    used: npt.NDArray[np.float32]
    home_nodes: IntArray

    @classmethod
    def from_choices(cls, experts: IntArray, home_nodes: IntArray, num_experts: int) -> "ExpertUsage":
        """The usage of chosen experts (T, K) by tokens on home nodes (T,)."""
        used = np.zeros((len(experts), num_experts), np.float32)
        used[np.arange(len(experts))[:, None], experts] = 1
        return cls(used, home_nodes)


def co_locate(usage: ExpertUsage, start: IntArray, *, ranks_of_node: IntArray, imbalance_price: float) -> IntArray:
    """The node of each expert (E,) after swaps from `start` (E,); the number of experts on each node stays.

    `ranks_of_node` (N,) are the ranks on each node. `imbalance_price` is the price of uneven nodes in node transfers:
    with load l on a node of r ranks it multiplies the sum of l^2 / r, divided by the least possible value of this sum.
    """
    nodes = start.copy()
    load = usage.used.sum(axis=0).astype(np.float64)
    price = imbalance_price * ranks_of_node.sum() / max(load.sum(), 1.0)
    cost = _cost(usage, nodes, load, ranks_of_node, price)
    for _ in range(MAX_ROUNDS):
        change = _changes(usage, nodes, load, ranks_of_node, price)
        pairs = _disjoint(change)
        while pairs:
            tried = nodes.copy()
            for one, other in pairs:
                tried[[one, other]] = nodes[[other, one]]
            tried_cost = _cost(usage, tried, load, ranks_of_node, price)
            if tried_cost < cost - MIN_GAIN:
                break
            pairs = pairs[: len(pairs) // 2]
        if not pairs:
            return nodes
        nodes, cost = tried, tried_cost
    return nodes


def greedy_nodes(usage: ExpertUsage, slots_per_node: IntArray) -> IntArray:
    """A start for `co_locate` (E,): each node takes the busiest free expert, then those most used with its own."""
    used_together = usage.used.T @ usage.used
    nodes = np.full(len(used_together), -1)
    for node, num_slots in enumerate(slots_per_node.tolist()):
        for _ in range(num_slots):
            with_own = used_together[:, nodes == node].sum(axis=1)
            score = with_own if with_own.any() else np.diag(used_together)
            nodes[np.argmax(np.where(nodes < 0, score, -1.0))] = node
    return nodes


def num_node_transfers(usage: ExpertUsage, nodes: IntArray, num_nodes: int) -> int:
    """The number of (token, node) pairs in which the token is transferred to another node than its home's."""
    transferred = usage.used @ np.eye(num_nodes, dtype=np.float32)[nodes] > 0
    transferred[np.arange(len(transferred)), usage.home_nodes] = False
    return int(np.count_nonzero(transferred))


def _cost(usage: ExpertUsage, nodes: IntArray, load: Float64Array, ranks_of_node: IntArray, price: float) -> float:
    on_node = np.bincount(nodes, load, minlength=len(ranks_of_node))
    return num_node_transfers(usage, nodes, len(ranks_of_node)) + price * float((on_node**2 / ranks_of_node).sum())


def _changes(
    usage: ExpertUsage, nodes: IntArray, load: Float64Array, ranks_of_node: IntArray, price: float
) -> Float64Array:
    """The change of the cost when two experts swap nodes (E, E)."""
    num_nodes, tokens = len(ranks_of_node), np.arange(len(usage.home_nodes))
    counts = usage.used @ np.eye(num_nodes, dtype=np.float32)[nodes]
    new = (counts == 0).astype(np.float32)
    new[tokens, usage.home_nodes] = 0
    alone = (counts == 1).astype(np.float32)
    alone[tokens, usage.home_nodes] = 0
    # Minus one transfer for a token whose only expert on a node leaves it, plus one for a token whose first arrives.
    leaving = usage.used * alone[:, nodes]
    moving = (usage.used.T @ new)[:, nodes].astype(np.float64) - leaving.sum(axis=0, dtype=np.float64)[:, None]
    # A token that uses both experts keeps its transfers: correct for the gains counted above.
    both = (leaving.T @ usage.used).astype(np.float64)
    change: Float64Array = moving + moving.T + both + both.T
    on_node = np.bincount(nodes, load, minlength=num_nodes)
    heavier = load[None, :] - load[:, None]
    uneven = ((on_node[nodes][:, None] + heavier) ** 2 - on_node[nodes][:, None] ** 2) / ranks_of_node[nodes][:, None]
    change += price * (uneven + uneven.T)
    change[nodes[:, None] == nodes[None, :]] = 0
    return change


def _disjoint(change: Float64Array) -> list[tuple[int, int]]:
    """Pairs that lower the cost, the best first, without a common expert."""
    rows, columns = np.nonzero(np.triu(change < -MIN_GAIN))
    order = np.argsort(change[rows, columns], kind="stable")
    pairs: list[tuple[int, int]] = []
    paired: set[int] = set()
    for one, other in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if not paired & {one, other}:
            paired |= {one, other}
            pairs.append((one, other))
    return pairs
