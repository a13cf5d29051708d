"""Choosing where the experts of one layer stand, from its recorded routing. Pure.

`linear` is the default of a run. `balanced` evens the load of the ranks, wherever their tokens come from. `topology`
also gathers experts by node, with several prices on uneven nodes, and takes what `replay` foretells the least time for:
rows of the busiest rank, bytes and messages of the busiest links. A rank hosts no more experts of a layer than an even
share, so one at most where there are as many ranks as experts and copies.
"""

from collections.abc import Iterator

import numpy as np

from moempi.arrays import BoolArray, Float64Array, IntArray
from moempi.layout.placement import Placement, linear
from moempi.planning.colocate import ExpertUsage, clusters, co_locate
from moempi.planning.load_balance import assign, rebalance, replica_counts, slots_per_rank
from moempi.planning.replay import Cluster, Routes, replay

POLICIES = ("linear", "balanced", "topology")
PRICES = (0.0, 0.3, 3.0)
"""Prices of uneven nodes, in crossings, that `topology` tries."""
SAMPLED_TOKENS = 8192
UNUSED = 1e-6
"""Load of an expert that no token chose: it stands somewhere all the same."""


def choose_placement(
    policy: str, routes: Routes, cluster: Cluster, *, num_experts: int, num_physical: int
) -> Placement:
    """The placement of a policy; `num_keys` counts experts and copies, at most one of each expert on a rank."""
    if policy == "linear":
        return _linear(routes, cluster, num_experts, num_physical)
    if policy == "balanced":
        return _balanced(routes, cluster, num_experts, num_physical)
    tried = [_linear(routes, cluster, num_experts, num_physical), _balanced(routes, cluster, num_experts, num_physical)]
    if cluster.topology.num_nodes > 1:
        tried += _co_located(routes, cluster, num_experts, num_physical)
    return min(dict.fromkeys(tried), key=lambda placement: replay(routes, placement, cluster).time_s)


def _linear(routes: Routes, cluster: Cluster, num_experts: int, num_physical: int) -> Placement:
    """Copies of the hottest experts go to the ranks that host fewest."""
    demand = _demand(routes, cluster, num_experts)
    hosts = np.zeros(demand.shape, bool)
    for rank, experts in enumerate(linear(num_experts, len(hosts)).hosted):
        hosts[rank, list(experts)] = True
    room = slots_per_rank(num_experts, num_physical, len(hosts)) - hosts.sum(axis=1)
    more = replica_counts(demand.sum(axis=0), num_physical, len(hosts)) - 1
    _assign_replicas(hosts, np.where(more > 0, 1.0, 0.0), more, room, by_node=None)
    return _placement(hosts)


def _balanced(routes: Routes, cluster: Cluster, num_experts: int, num_physical: int) -> Placement:
    demand = _demand(routes, cluster, num_experts)
    hosts = np.zeros(demand.shape, bool)
    counts = replica_counts(demand.sum(axis=0), num_physical, len(hosts))
    _assign_replicas(
        hosts, demand.sum(axis=0) / counts, counts, slots_per_rank(num_experts, num_physical, len(hosts)), by_node=None
    )
    rebalance(hosts, demand, cluster.nodes, within_nodes=False)
    return _placement(hosts)


def _co_located(routes: Routes, cluster: Cluster, num_experts: int, num_physical: int) -> Iterator[Placement]:
    """Experts by node from two starts and several prices, then evenly among the ranks of each node."""
    demand = _demand(routes, cluster, num_experts)
    counts = replica_counts(demand.sum(axis=0), num_physical, len(demand))
    room = slots_per_rank(num_experts, num_physical, len(demand))
    nodes = np.array(cluster.nodes)
    own_room = np.bincount(nodes, slots_per_rank(num_experts, num_experts, len(demand))).astype(np.int64)
    uses = _usage(routes, cluster, num_experts)
    for start in (np.repeat(np.arange(cluster.topology.num_nodes), own_room), clusters(uses, own_room)):
        for price in PRICES:
            node_of = co_locate(uses, start, ranks_of_node=np.bincount(nodes), imbalance_price=price)
            hosts, left = np.zeros(demand.shape, bool), room.copy()
            assign(hosts, demand.sum(axis=0) / counts, left, nodes[:, None] == node_of)
            _assign_replicas(hosts, demand.sum(axis=0) / counts, counts - 1, left, by_node=nodes)
            rebalance(hosts, demand, cluster.nodes, within_nodes=True)
            yield _placement(hosts)


def _assign_replicas(
    hosts: BoolArray, load: Float64Array, more: IntArray, free_slots: IntArray, *, by_node: IntArray | None
) -> None:
    """Add `more` (E,) copies of each expert; with `by_node` (R,) first to nodes that have none."""
    for done in range(int(more.max(initial=0))):
        allowed = np.ones(hosts.shape, bool)
        if by_node is not None:
            allowed = ~np.stack([hosts[by_node == node].any(axis=0) for node in by_node])
        assign(hosts, np.where(more > done, load, 0.0), free_slots, allowed)


def _demand(routes: Routes, cluster: Cluster, num_experts: int) -> Float64Array:
    """Rows that each rank has for each expert (R, E)."""
    num_ranks = len(cluster.nodes)
    wanted = (routes.homes[:, None] * num_experts + routes.experts).reshape(-1)
    counts = np.bincount(wanted, minlength=num_ranks * num_experts).reshape(num_ranks, num_experts)
    return counts.astype(np.float64) + UNUSED


def _usage(routes: Routes, cluster: Cluster, num_experts: int) -> ExpertUsage:
    """Those of some tokens, evenly drawn; with one hop each choice travels alone."""
    every = max(1, -(-len(routes.homes) // SAMPLED_TOKENS))
    experts, homes = routes.experts[::every], np.array(cluster.nodes)[routes.homes[::every]]
    if cluster.hops == 1:
        experts, homes = experts.reshape(-1, 1), np.repeat(homes, experts.shape[1])
    return ExpertUsage.from_choices(experts, homes, num_experts)


def _placement(hosts: BoolArray) -> Placement:
    return Placement(tuple(tuple(np.flatnonzero(on_rank).tolist()) for on_rank in hosts))
