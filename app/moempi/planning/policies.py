"""Placement policies: the ranks of one layer's experts, from its recorded routing. Pure.

`linear` is the default of a run. `balanced` evens the load of the ranks, regardless of the home of the tokens.
`topology` also co-locates experts by node, for several prices on uneven nodes, and takes the placement with the least
time in `replay`: rows of the busiest rank, bytes and messages of the busiest links. A rank hosts at most an even share
of a layer's physical experts, rounded up.
"""

from collections.abc import Iterator

import numpy as np

from moempi.arrays import BoolArray, Float64Array, IntArray
from moempi.layout.placement import Placement, linear
from moempi.planning.colocate import ExpertUsage, co_locate, greedy_nodes
from moempi.planning.load_balance import assign, rebalance, replica_counts, slots_per_rank
from moempi.planning.replay import Cluster, Routes, replay

POLICIES = ("linear", "balanced", "topology")
IMBALANCE_PRICES = (0.0, 0.3, 3.0)
"""Prices of uneven nodes, in node transfers, that `topology` tries."""
MAX_TOKENS = 8192
"""Tokens that co-location looks at."""
LEAST_DEMAND = 1e-6
"""Demand of a rank for an expert that none of its tokens chose, so that every expert is placed."""


def choose_placement(
    policy: str, routes: Routes, cluster: Cluster, *, num_experts: int, num_physical: int
) -> Placement:
    """The placement of one of POLICIES; `num_physical` counts experts and replicas, at most one of each on a rank."""
    if policy == "linear":
        return _linear(routes, cluster, num_experts, num_physical)
    if policy == "balanced":
        return _balanced(routes, cluster, num_experts, num_physical)
    tried = [_linear(routes, cluster, num_experts, num_physical), _balanced(routes, cluster, num_experts, num_physical)]
    if cluster.topology.num_nodes > 1:
        tried += _co_located(routes, cluster, num_experts, num_physical)
    return min(dict.fromkeys(tried), key=lambda placement: replay(routes, placement, cluster).time_s)


def _linear(routes: Routes, cluster: Cluster, num_experts: int, num_physical: int) -> Placement:
    """Even shares in ascending order; replicas of the hottest experts go to the ranks with the fewest experts."""
    demand = _demand(routes, cluster, num_experts)
    hosts = np.zeros(demand.shape, bool)
    for rank, experts in enumerate(linear(num_experts, len(hosts)).hosted):
        hosts[rank, list(experts)] = True
    free_slots = slots_per_rank(num_experts, num_physical, len(hosts)) - hosts.sum(axis=1)
    replicas = replica_counts(demand.sum(axis=0), num_physical, len(hosts)) - 1
    _assign_replicas(hosts, np.where(replicas > 0, 1.0, 0.0), replicas, free_slots, by_node=None)
    return _placement(hosts)


def _balanced(routes: Routes, cluster: Cluster, num_experts: int, num_physical: int) -> Placement:
    demand = _demand(routes, cluster, num_experts)
    hosts = np.zeros(demand.shape, bool)
    counts = replica_counts(demand.sum(axis=0), num_physical, len(hosts))
    slots = slots_per_rank(num_experts, num_physical, len(hosts))
    _assign_replicas(hosts, demand.sum(axis=0) / counts, counts, slots, by_node=None)
    rebalance(hosts, demand, cluster.nodes, within_nodes=False)
    return _placement(hosts)


def _co_located(routes: Routes, cluster: Cluster, num_experts: int, num_physical: int) -> Iterator[Placement]:
    """Experts on nodes from two starts and several prices, then evenly on the ranks of each node."""
    demand = _demand(routes, cluster, num_experts)
    counts = replica_counts(demand.sum(axis=0), num_physical, len(demand))
    slots = slots_per_rank(num_experts, num_physical, len(demand))
    nodes = np.array(cluster.nodes)
    slots_per_node = np.bincount(nodes, slots_per_rank(num_experts, num_experts, len(demand))).astype(np.int64)
    usage = _usage(routes, cluster, num_experts)
    consecutive = np.repeat(np.arange(cluster.topology.num_nodes), slots_per_node)
    for start in (consecutive, greedy_nodes(usage, slots_per_node)):
        for price in IMBALANCE_PRICES:
            node_of = co_locate(usage, start, ranks_of_node=np.bincount(nodes), imbalance_price=price)
            hosts, free_slots = np.zeros(demand.shape, bool), slots.copy()
            assign(hosts, demand.sum(axis=0) / counts, free_slots, nodes[:, None] == node_of)
            _assign_replicas(hosts, demand.sum(axis=0) / counts, counts - 1, free_slots, by_node=nodes)
            rebalance(hosts, demand, cluster.nodes, within_nodes=True)
            yield _placement(hosts)


def _assign_replicas(
    hosts: BoolArray, load: Float64Array, replicas: IntArray, free_slots: IntArray, *, by_node: IntArray | None
) -> None:
    """Add `replicas` (E,) of each expert; with `by_node` (R,), nodes without the expert come first."""
    for done in range(int(replicas.max(initial=0))):
        allowed = np.ones(hosts.shape, bool)
        if by_node is not None:
            allowed = ~np.stack([hosts[by_node == node].any(axis=0) for node in by_node])
        assign(hosts, np.where(replicas > done, load, 0.0), free_slots, allowed)


def _demand(routes: Routes, cluster: Cluster, num_experts: int) -> Float64Array:
    """Rows of each rank for each expert (R, E)."""
    num_ranks = len(cluster.nodes)
    pairs = (routes.homes[:, None] * num_experts + routes.experts).reshape(-1)
    counts = np.bincount(pairs, minlength=num_ranks * num_experts).reshape(num_ranks, num_experts)
    return counts.astype(np.float64) + LEAST_DEMAND


def _usage(routes: Routes, cluster: Cluster, num_experts: int) -> ExpertUsage:
    """The usage by a regular sample of at most MAX_TOKENS tokens; with one hop each choice is a token of its own."""
    stride = max(1, -(-len(routes.homes) // MAX_TOKENS))
    experts, home_nodes = routes.experts[::stride], np.array(cluster.nodes)[routes.homes[::stride]]
    if cluster.hops == 1:
        experts, home_nodes = experts.reshape(-1, 1), np.repeat(home_nodes, experts.shape[1])
    return ExpertUsage.from_choices(experts, home_nodes, num_experts)


def _placement(hosts: BoolArray) -> Placement:
    return Placement(tuple(tuple(np.flatnonzero(on_rank).tolist()) for on_rank in hosts))
