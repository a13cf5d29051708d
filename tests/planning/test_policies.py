"""Placement search: replay against a slow twin, swaps that lower the cost, and guarantees of the policies."""

import numpy as np
import pytest

from moempi.config.topology_file import LEVEL_NAMES, Level
from moempi.layout.forwarders import Forwarders
from moempi.layout.placement import Placement, linear
from moempi.layout.topology import NETWORK, Topology
from moempi.planning.colocate import ExpertUsage, co_locate, greedy_nodes, num_node_transfers
from moempi.planning.load_balance import rank_loads, rebalance, replica_counts, slots_per_rank
from moempi.planning.policies import POLICIES, choose_placement
from moempi.planning.replay import Cluster, Routes, replay

LEVELS = tuple(Level(name, 1.0 + i, 10.0 / (i + 1)) for i, name in enumerate(LEVEL_NAMES))
ROW_BYTES = 32


def make_cluster(nodes, hops, **changes):
    """Ranks on these nodes; nodes 2n and 2n + 1 share a switch, ranks of a node with equal parity an island."""
    topology = Topology(
        tuple(nodes),
        islands=tuple(2 * node + rank % 2 for rank, node in enumerate(nodes)),
        switches=tuple(node // 2 for node in nodes),
    )
    fields = {"topology": topology, "hops": hops, "row_bytes": ROW_BYTES, "levels": LEVELS, "row_s": 1e-6}
    return Cluster(**fields | changes)


def random_routes(random, *, ranks, experts, tokens=120, top_k=3, skew=0.0):
    homes = np.sort(random.integers(0, ranks, tokens))
    rows = np.arange(tokens) - np.searchsorted(homes, homes)
    preference = np.log(random.random((tokens, experts))) / np.arange(1, experts + 1) ** -skew
    return Routes(homes, rows, random.integers(0, 5, tokens), np.argsort(-preference, axis=1)[:, :top_k])


def random_placement(random, ranks, experts, num_replicas):
    hosted = [[] for _ in range(ranks)]
    for expert in [*range(experts), *random.integers(0, experts, num_replicas)]:
        rank = random.integers(0, ranks)
        if expert not in hosted[rank]:
            hosted[rank].append(int(expert))
    return Placement(tuple(map(tuple, hosted)))


def slow_replay(routes, placement, cluster):
    """The slow twin: one choice at a time."""
    nodes, moves = cluster.nodes, set()
    sent, messages = np.zeros((2, len(nodes), len(LEVELS)), int)
    rows = np.zeros(len(nodes), int)

    def level(one, other):
        if nodes[one] == nodes[other]:
            return 0 if one == other else 1 if one % 2 == other % 2 else 2
        return 3 if nodes[one] // 2 == nodes[other] // 2 else 4

    def move(hop, step, one, other):
        at = level(one, other)
        for end in (one, other) if cluster.counts_combine else (one,):
            sent[end, at] += ROW_BYTES
            messages[end, at] += (hop, step, one, other) not in moves
        moves.add((hop, step, one, other))

    for home, row, step, experts in zip(routes.homes, routes.rows, routes.steps, routes.experts, strict=True):
        physical_ids = placement.physical_ids(home, cluster.topology).reshape(placement.num_experts, -1)
        hosts = [int(placement.ranks[physical_ids[expert, row % placement.replica_period]]) for expert in experts]
        forwarders = Forwarders(nodes, int(home)).ranks
        for host in hosts:
            rows[host] += 1
            if cluster.hops == 1:
                move(0, step, int(home), host)
            else:
                move(1, step, int(forwarders[nodes[host]]), host)
        if cluster.hops == 2:
            for node in {nodes[host] for host in hosts}:
                move(0, step, int(home), int(forwarders[node]))
    return sent, messages, rows


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("nodes", [(0,), (0, 0, 0), (0, 0, 1, 1), (0, 1, 1, 1, 2)])
@pytest.mark.parametrize("num_replicas", [0, 4])
def test_replay_equals_the_slow_twin(nodes, hops, num_replicas):
    random = np.random.default_rng(len(nodes))
    for counts_combine in (True, False):
        cluster = make_cluster(nodes, hops, counts_combine=counts_combine)
        routes = random_routes(random, ranks=len(nodes), experts=7)
        placement = random_placement(random, len(nodes), 7, num_replicas)
        found = replay(routes, placement, cluster)
        for ours, theirs in zip(
            (found.sent_bytes, found.messages, found.rows), slow_replay(routes, placement, cluster), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


def test_expected_loads_are_the_means_over_the_replica_period():
    random = np.random.default_rng(4)
    for _ in range(20):
        nodes = np.sort(random.integers(0, 3, 6))
        nodes = np.unique(nodes, return_inverse=True)[1].tolist()
        placement = random_placement(random, 6, 5, 7)
        demand = random.random((6, 5))
        hosts = np.array([[expert in hosted for expert in range(5)] for hosted in placement.hosted])
        expected = np.zeros((6, 5))
        for source in range(6):
            physical_ids = placement.physical_ids(source, Topology(tuple(nodes))).reshape(5, placement.replica_period)
            for expert in range(5):
                on_rank = np.bincount(placement.ranks[physical_ids[expert]], minlength=6) / placement.replica_period
                expected[:, expert] += demand[source, expert] * on_rank
        np.testing.assert_allclose(rank_loads(hosts, demand, nodes), expected, rtol=1e-12)


def test_co_location_lowers_node_transfers_and_keeps_shares():
    random = np.random.default_rng(2)
    usage = ExpertUsage.from_choices(
        np.argsort(random.random((400, 12)), axis=1)[:, :3], random.integers(0, 3, 400), 12
    )
    ranks_of_node, slots = np.array([2, 2, 1]), np.array([5, 5, 2])
    for start in (np.repeat(range(3), slots), greedy_nodes(usage, slots)):
        found = co_locate(usage, start, ranks_of_node=ranks_of_node, imbalance_price=0.0)
        assert np.bincount(found).tolist() == slots.tolist()
        assert num_node_transfers(usage, found, 3) <= num_node_transfers(usage, start, 3)
        # No further swap of two experts lowers them.
        for one in range(12):
            for other in range(one):
                changed = found.copy()
                changed[[one, other]] = found[[other, one]]
                assert num_node_transfers(usage, changed, 3) >= num_node_transfers(usage, found, 3)


def test_one_hop_co_location_is_as_good_as_the_assignment():
    optimize = pytest.importorskip("scipy.optimize")
    random = np.random.default_rng(3)
    for _ in range(5):
        experts, homes = random.integers(0, 12, (300, 1)), random.integers(0, 3, 300)
        usage = ExpertUsage.from_choices(experts, homes, 12)
        found = co_locate(usage, np.repeat(range(3), 4), ranks_of_node=np.ones(3, int), imbalance_price=0.0)
        away = np.array([[(homes[experts[:, 0] == e] != n).sum() for n in np.repeat(range(3), 4)] for e in range(12)])
        best = away[optimize.linear_sum_assignment(away)].sum()
        assert best <= num_node_transfers(usage, found, 3) <= 1.02 * best


def test_replicas_and_slots_are_shared_evenly():
    assert replica_counts(np.array([8.0, 1.0, 3.0]), 6, 4).tolist() == [3, 1, 2]
    assert replica_counts(np.array([8.0, 1.0, 3.0]), 7, 3).tolist() == [3, 1, 3]
    for experts, num_physical, ranks in ((6, 7, 4), (9, 10, 6), (3, 3, 8), (3, 9, 8), (16, 20, 5)):
        slots = slots_per_rank(experts, num_physical, ranks)
        assert slots.sum() == num_physical
        assert slots.max() == max(1, -(-num_physical // ranks))
        assert (slots >= [len(hosted) for hosted in linear(experts, ranks).hosted]).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize(
    ("nodes", "experts", "num_physical"),
    [
        ((0, 0, 0, 1, 1), 7, 7),
        ((0, 0, 1, 1), 6, 11),
        ((0,) * 8, 4, 8),
        ((0, 1), 5, 10),
        ((0,), 3, 3),
        ((0, 1, 2), 9, 14),
    ],
)
def test_policies_host_every_expert_within_even_shares(policy, hops, nodes, experts, num_physical):
    routes = random_routes(np.random.default_rng(1), ranks=len(nodes), experts=experts, skew=1.0)
    cluster = make_cluster(nodes, hops)
    found = choose_placement(policy, routes, cluster, num_experts=experts, num_physical=num_physical)
    assert sorted(set(found.experts.tolist())) == list(range(experts))
    assert len(found.experts) == num_physical
    assert max(map(len, found.hosted)) <= -(-num_physical // len(nodes))
    assert all(len(set(hosted)) == len(hosted) for hosted in found.hosted)
    if policy == "topology":
        times = {
            p: replay(
                routes, choose_placement(p, routes, cluster, num_experts=experts, num_physical=num_physical), cluster
            )
            for p in POLICIES
        }
        assert replay(routes, found, cluster).time_s == min(forecast.time_s for forecast in times.values())


def test_a_layer_without_tokens_can_be_placed():
    nothing = Routes(*(np.zeros(0, int) for _ in range(3)), np.zeros((0, 2), int))
    for policy in POLICIES:
        found = choose_placement(policy, nothing, make_cluster((0, 0, 1), 2), num_experts=6, num_physical=7)
        assert sorted(set(found.experts.tolist())) == list(range(6))


def test_rebalancing_within_nodes_keeps_the_experts_of_each_node():
    random = np.random.default_rng(8)
    nodes = (0, 0, 1, 1)
    hosts = np.array([[rank == expert % 4 for expert in range(12)] for rank in range(4)])
    demand = random.random((4, 12)) * np.arange(12) ** 2
    before, original = rank_loads(hosts, demand, nodes).sum(axis=1), hosts.copy()
    rebalance(hosts, demand, nodes, within_nodes=True)
    assert (hosts[:2].any(axis=0) == original[:2].any(axis=0)).all()
    assert hosts.sum(axis=1).tolist() == [3, 3, 3, 3]
    assert rank_loads(hosts, demand, nodes).sum(axis=1).max() <= before.max()


def test_communities_are_co_located_and_hot_experts_replicated():
    from moempi.bench.placement import RoutingMaker

    maker, nodes = RoutingMaker(tokens=4000, experts=32, top_k=4, ranks=8), (0, 0, 1, 1, 2, 2, 3, 3)
    routes, cluster = maker.communities(num=4), make_cluster(nodes, 2, row_s=1e-9, row_bytes=4096)
    sent = {
        policy: replay(
            routes, choose_placement(policy, routes, cluster, num_experts=32, num_physical=32), cluster
        ).sent_bytes.sum(axis=0)
        for policy in POLICIES
    }
    assert sent["topology"][NETWORK] <= 0.7 * sent["linear"][NETWORK]
    routes, cluster = maker.zipf(), make_cluster(nodes, 1)
    for policy in ("balanced", "topology"):
        assert (
            replay(
                routes, choose_placement(policy, routes, cluster, num_experts=32, num_physical=40), cluster
            ).imbalance
            <= 0.15
        )
