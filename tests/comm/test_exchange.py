"""One hop: rows are dispatched to their experts and combined with the same bits over every transport."""

import numpy as np
import pytest

from comm.exchanges import exchange_rows, expected, make, route_of, rows_of

TRANSPORTS = ["alltoallv", "pairwise", "shared"]


def num_rows(case, rank, step):
    return {"even": 6, "uneven": (3 * rank + step) % 7, "one": 5 if rank == 0 else 0, "none": 0}[case]


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("case", ["even", "uneven", "one", "none"])
def test_outputs_are_combined_in_slot_order(comm, num_ranks, case):
    from moempi.layout.placement import linear

    placement = linear(7, num_ranks)
    exchanges = {name: make(comm, placement, transport=name, hops=1, nodes=(0,) * num_ranks)[0] for name in TRANSPORTS}
    for step in range(4):
        rows = rows_of(comm.rank, num_rows(case, comm.rank, step), step)
        experts, weights = route_of(comm.rank, len(rows), 7, step)
        for name, exchange in exchanges.items():
            phases, combined = exchange_rows(exchange, placement, comm.rank, rows, experts, weights)
            assert phases == ["dispatch", "combine"]
            assert (combined == expected(rows, experts, weights)).all(), f"{name}, step {step}"


@pytest.mark.ranks(3)
def test_rows_that_exceed_the_shared_slot_are_combined(comm, num_ranks):
    from moempi.layout.placement import linear

    placement = linear(3, num_ranks)
    for name in TRANSPORTS:
        exchange, _ = make(comm, placement, transport=name, hops=1, nodes=(0, 0, 0))
        for step in range(4):
            rows = rows_of(comm.rank, 40, step)
            experts = np.full((40, 1), 1, np.int32)
            weights = np.ones((40, 1), np.float32)
            _, combined = exchange_rows(exchange, placement, comm.rank, rows, experts, weights)
            assert (combined == expected(rows, experts, weights)).all(), f"{name}, step {step}"


@pytest.mark.ranks(3, 6)
def test_counters_add_up_bytes_by_level_of_link(comm, num_ranks):
    from moempi.layout.placement import linear

    placement = linear(6, num_ranks)
    groups = {"island": (0, 1, 1, 2, 2, 3)[:num_ranks], "node": (0, 0, 0, 1, 1, 2)[:num_ranks]}
    groups["switch"] = (0, 0, 0, 0, 0, 1)[:num_ranks]
    exchange, transfers = make(
        comm,
        placement,
        transport="pairwise",
        hops=1,
        nodes=groups["node"],
        islands=groups["island"],
        switches=groups["switch"],
    )
    rows = rows_of(comm.rank, 5, 0)
    experts, weights = route_of(comm.rank, 5, 6, 0)
    exchange_rows(exchange, placement, comm.rank, rows, experts, weights)
    # Each choice is one dispatched row and one returned row; count the rows of both kinds that this rank sends.
    all_experts = comm.allgather(experts)
    sent = dict.fromkeys(("self", *groups, "network"), 0)
    for source, chosen in enumerate(all_experts):
        for host in (chosen // (6 // num_ranks)).reshape(-1).tolist():
            shared = (level for level, of_ranks in groups.items() if of_ranks[host] == of_ranks[source])
            level = "self" if host == source else next(shared, "network")
            sent[level] += (source == comm.rank) + (host == comm.rank)
    assert {level: transfers.counters[f"{level}_bytes"] for level in sent} == {
        level: count * rows.itemsize * rows.shape[1] for level, count in sent.items()
    }
