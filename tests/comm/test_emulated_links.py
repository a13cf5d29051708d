"""Emulated links: rows arrive unchanged, no earlier than latency and bandwidth allow."""

import time
from functools import partial

import numpy as np
import pytest
from mpi4py import MPI

from moempi.backend.cpu.backend import NumpyBackend
from moempi.comm.hop import Hop
from moempi.comm.transfers import NO_REQUEST, PendingTransfers, Transfers
from moempi.comm.transports.alltoallv import Alltoallv
from moempi.comm.transports.base import start_transfer, wait
from moempi.comm.transports.emulated import DelayedReceipt, EmulatedLinks, Link
from moempi.comm.transports.loopback import Loopback
from moempi.layout.topology import NETWORK, NODE, SELF, Topology


def test_a_link_carries_one_transfer_after_another():
    link = Link(latency_s=0.5, bytes_per_s=1000.0)
    begin = time.perf_counter()
    first, second = link.arrival(2000), link.arrival(1000)
    assert begin <= first - 2.5 <= time.perf_counter()
    assert second == pytest.approx(first + 1.0)
    assert link.busy_s == pytest.approx(3.0)


def test_a_transfer_is_not_complete_before_its_arrival():
    assert not DelayedReceipt(NO_REQUEST, time.perf_counter() + 3600.0).Test()
    receipt = DelayedReceipt(NO_REQUEST, time.perf_counter() + 0.05)
    wait(receipt)
    assert time.perf_counter() >= receipt.arrival
    assert receipt.Test()


@pytest.mark.ranks(1, 3)
def test_rows_arrive_intact_after_the_latency(comm):
    counts = np.array([1 + (comm.rank + other) % 2 for other in range(comm.size)])
    outgoing = np.repeat(100 * comm.rank + np.arange(comm.size), counts).astype(np.int64)
    incoming = np.zeros(counts.sum(), np.int64)
    levels = Topology((0,) * comm.size).levels(comm.rank)
    links = {NODE: Link(0.05, 1e9)}
    transport = EmulatedLinks(Alltoallv(comm, row_bytes=8), links, levels=levels, row_bytes=8)
    begin = time.perf_counter()
    request = start_transfer(transport, outgoing, counts, incoming, counts)
    if comm.size > 1:
        assert not request.Test() or time.perf_counter() - begin >= 0.05
    wait(request)
    assert time.perf_counter() - begin >= 0.05 * (comm.size > 1)
    assert (links[NODE].busy_s > 0) == (comm.size > 1)
    np.testing.assert_array_equal(incoming, np.repeat(100 * np.arange(comm.size) + comm.rank, counts))


@pytest.mark.ranks(2)
def test_rows_of_a_late_sender_take_the_latency_from_then_on(comm):
    from comm.exchanges import exchange_rows, make, route_of, rows_of
    from moempi.layout.placement import Placement

    placement = Placement(((0, 1), (2, 3)))
    links = {NETWORK: Link(0.2, 1e9)}
    exchange, _ = make(comm, placement, transport="pairwise", hops=1, nodes=(0, 1), links=links)
    rows, routes = rows_of(comm.rank, 8, 0), route_of(comm.rank, 8, 4, 0)
    comm.Barrier()
    begin = time.perf_counter()
    if comm.rank == 1:
        time.sleep(0.3)
    exchange_rows(exchange, placement, comm.rank, rows, *routes)
    assert time.perf_counter() - begin >= 0.3 + 2 * 0.2
    exchange.free()


@pytest.mark.ranks(4)
def test_rows_use_the_links_of_their_level(comm):
    links = {NODE: Link(latency_s=0.0, bytes_per_s=1e6), NETWORK: Link(latency_s=0.0, bytes_per_s=1e5)}
    levels = Topology((0, 0, 1, 1)).levels(comm.rank)
    transport = EmulatedLinks(Alltoallv(comm, row_bytes=8), links, levels=levels, row_bytes=8)
    counts = np.choose(levels, [50, 0, 10, 0, 5])  # rows to itself, inside the node, to each rank of the other node
    rows = np.zeros(70, np.int64)
    wait(start_transfer(transport, rows, counts, np.empty_like(rows), counts))
    assert links[NODE].busy_s == pytest.approx(80 / 1e6)
    assert links[NETWORK].busy_s == pytest.approx(80 / 1e5)


def test_a_rank_alone_waits_for_its_emulated_link():
    backend = NumpyBackend(precision="float32")
    transfers = Transfers(backend, PendingTransfers())
    links = EmulatedLinks(
        Loopback(partial(backend.row_buffer, width=2)), {SELF: Link(0.05, 1e9)}, levels=np.array([SELF]), row_bytes=8
    )
    hop = Hop(MPI.COMM_SELF, backend, transfers=transfers, transport=links)
    begin = MPI.Wtime()
    rows, counts = np.ones((3, 2), np.float32), np.array([3])
    receipt = transfers.start(hop.exchange_steps(rows, None, counts, counts)).finish()
    assert MPI.Wtime() - begin >= 0.05
    np.testing.assert_array_equal(hop.unpack(receipt, None), np.ones((3, 2)))
