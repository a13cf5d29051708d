"""Spreading the load: copies for hot experts, and experts to ranks so that the busiest rank has least to do. Pure.

Copies go one by one to the expert whose copies have most to do each; experts go to the rank that has least to do, the
busiest first (longest processing time, Graham 1969); then pairs of experts change places while that evens the load.
"""

from collections.abc import Sequence

import numpy as np

from moempi.arrays import BoolArray, Float64Array, IntArray
from moempi.layout.placement import linear

MOST_EXCHANGES = 1000
LEAST_GAIN = 1e-9


def slots_per_rank(num_experts: int, num_physical: int, num_ranks: int) -> IntArray:
    """Experts of each rank (R,): the shares of `placement.linear`, and one more of the copies to the smallest each."""
    room = np.array([len(hosted) for hosted in linear(num_experts, num_ranks).hosted])
    for _ in range(num_physical - num_experts):
        room[np.argmin(room)] += 1
    return room


def replica_counts(load: Float64Array, num_physical: int, num_ranks: int) -> IntArray:
    """How many ranks host each expert (E,), `num_keys` in all, none more than there are ranks."""
    counts = np.ones(len(load), np.int64)
    for _ in range(num_physical - len(load)):
        counts[np.argmax(np.where(counts < num_ranks, load / counts, -1.0))] += 1
    return counts


def rank_loads(hosts: BoolArray, demand: Float64Array, nodes: Sequence[int]) -> Float64Array:
    """Rows of each expert on each rank (..., R, E), where `hosts` (..., R, E) says who hosts it.

    Rank r has demand[r, e] (R, E) rows for expert e, which go to the nearest copy, equally near ones in turns.
    """
    by_node = np.equal.outer(np.unique(nodes), np.array(nodes)).astype(float)
    kept = np.where(hosts, demand, 0.0)
    left = by_node @ (demand - kept)
    near = by_node @ hosts
    per_copy = np.divide(left, near, out=np.zeros_like(left), where=near > 0)
    far = np.where(near > 0, 0.0, left).sum(axis=-2, keepdims=True) / hosts.sum(axis=-2, keepdims=True)
    loads: Float64Array = kept + np.where(hosts, by_node.T @ per_copy + far, 0.0)
    return loads


def assign(hosts: BoolArray, load: Float64Array, free_slots: IntArray, allowed: BoolArray) -> None:
    """Put one more copy of each expert with `load` (E,) above 0 on the allowed (R, E) rank with room and least to do.

    Changes hosts (R, E) and room (R,). What a rank has to do is the load of what was put there. Where no allowed rank
    has room, any other takes it.
    """
    todo = np.where(hosts, load, 0.0).sum(axis=1)
    for expert in np.argsort(-load, kind="stable")[: np.count_nonzero(load > 0)].tolist():
        free = (free_slots > 0) & ~hosts[:, expert]
        if not free.any():
            free = _free_a_slot(hosts, free_slots, expert)
        best = free & allowed[:, expert]
        rank = int(np.argmin(np.where(best if best.any() else free, todo, np.inf)))
        hosts[rank, expert] = True
        free_slots[rank] -= 1
        todo[rank] += load[expert]


def _free_a_slot(hosts: BoolArray, free_slots: IntArray, expert: int) -> BoolArray:
    """Where all ranks with room host the expert already: another's expert moves to one of them; who has room then."""
    roomy = int(np.argmax(free_slots))
    for rank in np.flatnonzero(~hosts[:, expert]).tolist():
        movable = np.flatnonzero(hosts[rank] & ~hosts[roomy])
        if len(movable):
            hosts[[rank, roomy], movable[0]] = False, True
            free_slots[[rank, roomy]] += 1, -1
            return np.isin(np.arange(len(free_slots)), rank)
    raise ValueError(f"expert {expert} has more copies than there are ranks")


def rebalance(hosts: BoolArray, demand: Float64Array, nodes: Sequence[int], *, within_nodes: bool) -> None:
    """Let experts of the busiest rank change places with others, the best pair first, while the load gets more even.

    Changes hosts (R, E). The sum of the squares of the ranks' loads falls with every exchange. With `within_nodes` no
    expert leaves its node.
    """
    where = np.array(nodes)
    for _ in range(MOST_EXCHANGES):
        of_expert = rank_loads(hosts, demand, nodes)
        total = of_expert.sum(axis=1)
        busiest = int(np.argmax(total))
        near = (where == where[busiest]) if within_nodes else np.ones(len(where), bool)
        takers, theirs = np.nonzero(hosts & ~hosts[busiest] & near[:, None])
        if not len(takers):
            return
        gained = np.concatenate(
            [
                _moved(hosts, demand, nodes, other, taker, [busiest]) - of_expert[:, other]
                for taker, other in zip(takers.tolist(), theirs.tolist(), strict=True)
            ]
        )
        best, change = (total**2).sum() * (1 - LEAST_GAIN), None
        for mine in np.flatnonzero(hosts[busiest]).tolist():
            given = _moved(hosts, demand, nodes, mine, busiest, range(len(where))) - of_expert[:, mine]
            squares = ((total + given[takers] + gained) ** 2).sum(axis=1)
            squares[hosts[takers, mine]] = np.inf
            pair = int(np.argmin(squares))
            if squares[pair] < best:
                best, change = squares[pair], (mine, takers[pair], theirs[pair])
        if change is None:
            return
        mine, taker, other = change
        hosts[[busiest, taker], [mine, other]] = False
        hosts[[taker, busiest], [mine, other]] = True


def _moved(
    hosts: BoolArray, demand: Float64Array, nodes: Sequence[int], expert: int, source: int, targets: Sequence[int]
) -> Float64Array:
    """Rows of one expert on each rank (targets, R) if it went from rank `source` to each of the targets."""
    there = np.repeat(hosts[None, :, expert], len(targets), axis=0)
    there[:, source] = False
    there[np.arange(len(targets)), list(targets)] = True
    return rank_loads(there[:, :, None], demand[:, expert, None], nodes)[:, :, 0]
