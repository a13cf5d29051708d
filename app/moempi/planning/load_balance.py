"""Load balancing: replicas of hot experts, and experts on ranks so that the busiest rank has the least load. Pure.

Replicas are given one by one to the expert with the highest load per replica. Experts go to the rank with the least
load, the busiest expert first (longest processing time, Graham 1969). Then pairs of experts are swapped while this
makes the load more even.
"""

from collections.abc import Sequence

import numpy as np

from moempi.arrays import BoolArray, Float64Array, IntArray
from moempi.layout.placement import linear

MAX_SWAPS = 1000
MIN_GAIN = 1e-9


def slots_per_rank(num_experts: int, num_physical: int, num_ranks: int) -> IntArray:
    """Physical experts of each rank (R,): the shares of `placement.linear`; each replica adds one to the smallest."""
    slots = np.array([len(hosted) for hosted in linear(num_experts, num_ranks).hosted])
    for _ in range(num_physical - num_experts):
        slots[np.argmin(slots)] += 1
    return slots


def replica_counts(load: Float64Array, num_physical: int, num_ranks: int) -> IntArray:
    """Replicas of each expert (E,) with load (E,): `num_physical` in total, and at most one per rank."""
    counts = np.ones(len(load), np.int64)
    for _ in range(num_physical - len(load)):
        counts[np.argmax(np.where(counts < num_ranks, load / counts, -1.0))] += 1
    return counts


def rank_loads(hosts: BoolArray, demand: Float64Array, nodes: Sequence[int]) -> Float64Array:
    """Rows of each expert on each rank (..., R, E), where `hosts` (..., R, E) is true for the experts of a rank.

    Rank r sends demand[r, e] (R, E) rows for expert e to its nearest replica, and divides them among equally near ones.
    """
    by_node = np.equal.outer(np.unique(nodes), np.array(nodes)).astype(float)
    on_own_rank = np.where(hosts, demand, 0.0)
    sent = by_node @ (demand - on_own_rank)
    replicas_on_node = by_node @ hosts
    per_replica = np.divide(sent, replicas_on_node, out=np.zeros_like(sent), where=replicas_on_node > 0)
    far = np.where(replicas_on_node > 0, 0.0, sent).sum(axis=-2, keepdims=True) / hosts.sum(axis=-2, keepdims=True)
    loads: Float64Array = on_own_rank + np.where(hosts, by_node.T @ per_replica + far, 0.0)
    return loads


def assign(hosts: BoolArray, load: Float64Array, free_slots: IntArray, allowed: BoolArray) -> None:
    """Add one replica of each expert with `load` (E,) above 0, on the allowed (R, E) rank with the least load.

    Changes hosts (R, E) and free_slots (R,). The load of a rank is the sum of the loads of the experts added to it. If
    no allowed rank has a free slot, any other rank is used. Raises ValueError if all ranks host the expert.
    """
    assigned = np.where(hosts, load, 0.0).sum(axis=1)
    for expert in np.argsort(-load, kind="stable")[: np.count_nonzero(load > 0)].tolist():
        free = (free_slots > 0) & ~hosts[:, expert]
        if not free.any():
            free = _free_a_slot(hosts, free_slots, expert)
        best = free & allowed[:, expert]
        rank = int(np.argmin(np.where(best if best.any() else free, assigned, np.inf)))
        hosts[rank, expert] = True
        free_slots[rank] -= 1
        assigned[rank] += load[expert]


def _free_a_slot(hosts: BoolArray, free_slots: IntArray, expert: int) -> BoolArray:
    """Move another expert to a rank with free slots, all of which host `expert`; the rank with the new slot (R,)."""
    target = int(np.argmax(free_slots))
    for rank in np.flatnonzero(~hosts[:, expert]).tolist():
        movable = np.flatnonzero(hosts[rank] & ~hosts[target])
        if len(movable):
            hosts[[rank, target], movable[0]] = False, True
            free_slots[[rank, target]] += 1, -1
            return np.isin(np.arange(len(free_slots)), rank)
    raise ValueError(f"expert {expert} has more replicas than there are ranks")


def rebalance(hosts: BoolArray, demand: Float64Array, nodes: Sequence[int], *, within_nodes: bool) -> None:
    """Swap experts of the busiest rank with experts of other ranks, the best pair first, while the load gets more even.

    Changes hosts (R, E). Each swap lowers the sum of the squares of the ranks' loads. With `within_nodes`, experts stay
    on their nodes.
    """
    node_of_rank = np.array(nodes)
    num_ranks = len(node_of_rank)
    for _ in range(MAX_SWAPS):
        loads = rank_loads(hosts, demand, nodes)
        total = loads.sum(axis=1)
        busiest = int(np.argmax(total))
        partners = (node_of_rank == node_of_rank[busiest]) if within_nodes else np.ones(num_ranks, bool)
        ranks, experts = np.nonzero(hosts & ~hosts[busiest] & partners[:, None])
        if not len(ranks):
            return
        received = np.concatenate(
            [
                _loads_if_moved(hosts, demand, nodes, expert, rank, [busiest]) - loads[:, expert]
                for rank, expert in zip(ranks.tolist(), experts.tolist(), strict=True)
            ]
        )
        best, swap = (total**2).sum() * (1 - MIN_GAIN), None
        for own in np.flatnonzero(hosts[busiest]).tolist():
            given = _loads_if_moved(hosts, demand, nodes, own, busiest, range(num_ranks)) - loads[:, own]
            squares = ((total + given[ranks] + received) ** 2).sum(axis=1)
            squares[hosts[ranks, own]] = np.inf
            pair = int(np.argmin(squares))
            if squares[pair] < best:
                best, swap = squares[pair], (own, ranks[pair], experts[pair])
        if swap is None:
            return
        own, rank, expert = swap
        hosts[[busiest, rank], [own, expert]] = False
        hosts[[rank, busiest], [own, expert]] = True


def _loads_if_moved(
    hosts: BoolArray, demand: Float64Array, nodes: Sequence[int], expert: int, source: int, targets: Sequence[int]
) -> Float64Array:
    """Rows of one expert on each rank (targets, R) if it moved from rank `source` to each of the targets."""
    moved = np.repeat(hosts[None, :, expert], len(targets), axis=0)
    moved[:, source] = False
    moved[np.arange(len(targets)), list(targets)] = True
    return rank_loads(moved[:, :, None], demand[:, expert, None], nodes)[:, :, 0]
