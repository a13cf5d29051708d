"""Two hops: the sums of one hop, and each row is sent across the network once per node."""

import numpy as np
import pytest

from comm.exchanges import WIDTH, exchange_rows, expected, make, route_of, rows_of

TRANSPORTS = ["alltoallv", "pairwise", "shared"]
PHASES = ["dispatch", "combine"]
NUM_EXPERTS, TOP_K = 9, 4


def node_shapes(size):
    """The ranks' nodes: one node, one node per rank, pairs, and unequal nodes."""
    yield (0,) * size
    yield tuple(range(size))
    yield tuple(rank // 2 for rank in range(size))
    yield tuple(int(rank > 0) for rank in range(size))


@pytest.mark.ranks(1, 2, 3, 5)
def test_two_hops_give_the_sums_of_one_hop(comm, num_ranks):
    from moempi.layout.placement import linear
    from moempi.layout.topology import numbered

    placement = linear(NUM_EXPERTS, num_ranks)
    for nodes in map(numbered, node_shapes(num_ranks)):
        exchanges = [make(comm, placement, transport=name, hops=2, nodes=nodes, top_k=TOP_K)[0] for name in TRANSPORTS]
        for step in range(3):
            rows = rows_of(comm.rank, (3 * comm.rank + 5 * step) % 8, step)
            experts, weights = route_of(comm.rank, len(rows), NUM_EXPERTS, step, top_k=TOP_K)
            found = [exchange_rows(exchange, placement, comm.rank, rows, experts, weights) for exchange in exchanges]
            np.testing.assert_allclose(found[0][1], expected(rows, experts, weights), rtol=1e-5)
            assert all(phases == PHASES for phases, _ in found)
            assert all((combined == found[0][1]).all() for _, combined in found), f"transports differ on {nodes}"


@pytest.mark.ranks(3, 5)
def test_each_token_is_sent_once_per_node(comm, num_ranks):
    from moempi.layout.placement import linear
    from moempi.layout.topology import numbered

    placement = linear(NUM_EXPERTS, num_ranks)
    hosts = np.searchsorted(placement.bounds, np.arange(NUM_EXPERTS), side="right") - 1
    for nodes in map(numbered, node_shapes(num_ranks)):
        exchange, transfers = make(comm, placement, transport="shared", hops=2, nodes=nodes, top_k=TOP_K)
        rows = rows_of(comm.rank, 20, 0)
        experts, weights = route_of(comm.rank, 20, NUM_EXPERTS, 0, top_k=TOP_K)
        exchange_rows(exchange, placement, comm.rank, rows, experts, weights)
        own = nodes[comm.rank]
        pairs = sum(len({nodes[hosts[expert]] for expert in chosen} - {own}) for chosen in experts.tolist())
        total = comm.allreduce(transfers.counters["network_bytes"])
        assert total == 2 * comm.allreduce(pairs) * WIDTH * 4  # dispatched and returned
        # One message to each other node, and one back to each row's home rank.
        assert transfers.counters["network_messages"] <= 2 * num_ranks
        assert comm.allreduce(transfers.counters["network_messages"]) <= 2 * num_ranks * max(nodes)


@pytest.mark.ranks(4)
def test_bfloat16_sums_differ_by_rounding_only(comm, num_ranks):
    from moempi.arrays import round_to_bfloat16
    from moempi.layout.placement import linear

    placement = linear(NUM_EXPERTS, num_ranks)
    nodes = (0, 0, 1, 1)
    exchange, _ = make(comm, placement, transport="shared", hops=2, nodes=nodes, precision="bfloat16", top_k=TOP_K)
    rows = round_to_bfloat16(rows_of(comm.rank, 12, 1))
    experts, weights = route_of(comm.rank, 12, NUM_EXPERTS, 1, top_k=TOP_K)
    _, combined = exchange_rows(exchange, placement, comm.rank, rows, experts, weights)
    np.testing.assert_allclose(combined, expected(rows, experts, weights), rtol=0.02)


def test_forwarders_have_equal_local_indices_or_wrap_around():
    from moempi.layout.forwarders import Forwarders

    nodes = (0, 0, 0, 1, 1, 2)
    assert [Forwarders(nodes, rank).ranks.tolist() for rank in range(6)] == [
        [0, 3, 5],
        [1, 4, 5],
        [2, 3, 5],
        [0, 3, 5],
        [1, 4, 5],
        [0, 3, 5],
    ]


def test_a_tokens_nodes_are_in_the_order_of_its_slots():
    from moempi.layout.forwarders import node_transfers

    pairs = node_transfers(np.array([[2, 0, 2], [1, 1, 1]]), 3)
    assert pairs.nodes.tolist() == [0, 1, 2]
    assert pairs.tokens.tolist() == [0, 1, 0]
    assert pairs.pairs.tolist() == [[2, 0, 2], [1, 1, 1]]
    assert pairs.present.tolist() == [[1, 1, 0], [1, 0, 0]]
