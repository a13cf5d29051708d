"""Placements with replicas: rows rotate among the nearest replicas, and the placement does not change the sums."""

import random

import numpy as np
import pytest

from comm.exchanges import exchange_rows, expected, make, route_of, rows_of

NUM_EXPERTS = 7


def random_placement(dice, num_ranks, *, replicas):
    """Every expert on a random rank, plus at most `replicas` replicas; some ranks may host none."""
    from moempi.layout.placement import Placement

    hosted = [[] for _ in range(num_ranks)]
    for expert in range(NUM_EXPERTS):
        hosted[dice.randrange(num_ranks)].append(expert)
    for _ in range(replicas):
        expert, rank = dice.randrange(NUM_EXPERTS), dice.randrange(num_ranks)
        if expert not in hosted[rank]:
            hosted[rank].append(expert)
    for experts in hosted:
        dice.shuffle(experts)
    return Placement(tuple(map(tuple, hosted)))


def nearest(placement, topology, source, expert):
    """The slow twin: the ranks of the nearest replicas."""
    hosts = [rank for rank, experts in enumerate(placement.hosted) if expert in experts]
    if source in hosts:
        return [source]
    for numbers in (topology.islands, topology.nodes, topology.switches):
        near = [rank for rank in hosts if numbers and numbers[rank] == numbers[source]]
        if near:
            return near
    return hosts


def test_rows_rotate_among_the_nearest_replicas():
    from moempi.layout.placement import REPLICA_PERIOD
    from moempi.layout.topology import Topology, numbered

    dice = random.Random(5)
    for _ in range(50):
        num_ranks = dice.randrange(1, 9)
        nodes = numbered(sorted(dice.randrange(4) for _ in range(num_ranks)))
        topology = Topology(
            nodes,
            islands=tuple(2 * node + dice.randrange(2) for node in nodes) if dice.random() < 0.5 else (),
            switches=tuple(node // 2 for node in nodes) if dice.random() < 0.5 else (),
        )
        placement = random_placement(dice, num_ranks, replicas=dice.randrange(12))
        assert placement.num_experts == NUM_EXPERTS
        for source in range(num_ranks):
            physical_ids = placement.physical_ids(source, topology).reshape(NUM_EXPERTS, placement.replica_period)
            np.testing.assert_array_equal(
                placement.experts[physical_ids], np.arange(NUM_EXPERTS)[:, None] + 0 * physical_ids
            )
            for expert, ranks in enumerate(placement.ranks[physical_ids]):
                near = nearest(placement, topology, source, expert)
                counts = np.bincount(ranks, minlength=num_ranks)
                assert np.flatnonzero(counts).tolist() == (
                    near if placement.replica_period == REPLICA_PERIOD else near[:1]
                )
                assert max(counts[near]) - min(counts[near]) <= 1


def test_equally_distant_sources_begin_with_different_replicas():
    from moempi.layout.placement import Placement
    from moempi.layout.topology import Topology

    placement = Placement(((0,), (0,), (1,), (2,), (3,), (4,)))
    first = [placement.ranks[placement.physical_ids(source, Topology((0,) * 6))[0]] for source in (2, 3, 4, 5)]
    assert sorted(first) == [0, 0, 1, 1]


@pytest.mark.ranks(2, 4, 8)
@pytest.mark.parametrize("hops", [1, 2])
def test_any_placement_gives_the_same_sums(comm, num_ranks, hops):
    dice = random.Random(num_ranks)
    nodes = tuple(rank * 3 // (num_ranks + 1) for rank in range(num_ranks))
    for replicas in (0, 1, 9):
        placement = random_placement(dice, num_ranks, replicas=replicas)
        exchange, transfers = make(comm, placement, transport="pairwise", hops=hops, nodes=nodes)
        for step in range(3):
            rows = rows_of(comm.rank, (5 * comm.rank + 7 * step) % 11, step)
            experts, weights = route_of(comm.rank, len(rows), NUM_EXPERTS, step)
            _, combined = exchange_rows(exchange, placement, comm.rank, rows, experts, weights)
            if hops == 1:
                assert (combined == expected(rows, experts, weights)).all()
            else:
                np.testing.assert_allclose(combined, expected(rows, experts, weights), rtol=1e-5)
        assert comm.allreduce(transfers.count_mismatch) == 0
        routed = sum(
            np.bincount(route_of(comm.rank, (5 * comm.rank + 7 * step) % 11, NUM_EXPERTS, step)[0].ravel(), minlength=7)
            for step in range(3)
        )
        np.testing.assert_array_equal(exchange.expert_load[0], routed)
