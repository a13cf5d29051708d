"""The communication of a lane: which ranks its parts join, and where the last layer's outputs go."""

import time
from dataclasses import replace

import numpy as np
import pytest
from mpi4py import MPI

from engine.jobs import make_job
from engine.runs import SMALL
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cuda.backend import CudaBackend
from moempi.comm import transfers as transfers_module
from moempi.comm.batch import NO_STEP
from moempi.comm.combine import HomeCombine
from moempi.comm.exchange import OneHop, Route
from moempi.comm.immediate import ImmediateCombine, ImmediateLink
from moempi.comm.lane_comm import LaneOptions, make_lane_comm, slot_rows
from moempi.comm.rank_groups import RankGroups
from moempi.comm.row_shape import RowShape
from moempi.comm.stage_link import StageLink
from moempi.comm.transfers import PendingTransfers, Transfers
from moempi.comm.transport_factory import TransportFactory
from moempi.comm.two_hops import TwoHops
from moempi.layout.layout import make_layout
from moempi.layout.row_buffers import SKEW_FACTOR
from moempi.layout.row_split import RowSplit
from moempi.layout.schedule import Point
from moempi.layout.topology import virtual
from simt.device import SimtDevice

SHAPE = RowShape(SMALL.width, top_k=2, group_rows=10)


def layout_of(num_ranks, **sections):
    return make_layout(make_job(**sections), SMALL, [0] * num_ranks)


def numpy_backend():
    return NumpyBackend(precision="float32")


def simt_backend():
    return CudaBackend(SimtDevice(), precision="float32", reproducible=True)


def make(comm, *, hops=1, ranks_per_node=2, on_route=None, make_backend=numpy_backend, **sections):
    backend = make_backend()
    topology = virtual(comm.size, ranks_per_node)
    transfers = Transfers(backend, PendingTransfers(), levels=topology.levels(comm.rank))
    layout = layout_of(comm.size, **sections)
    return make_lane_comm(
        RankGroups.make(comm, layout.grid),
        layout,
        topology,
        transports=TransportFactory(backend=backend, name="alltoallv", shape=SHAPE, slot_rows=8),
        transfers=transfers,
        options=LaneOptions(hops, on_route),
    )


def finish(steps):
    """The value of a generator that yields points."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def dispatch_and_combine(lane_comm, layer, rows):
    """Put rows through experts that change nothing; each row's choices are experts 0 and 3 with weights of a half."""
    experts = np.tile(np.array([0, 3], np.int32), (len(rows), 1))
    route = Route(layer, experts, np.full(experts.shape, 0.5, np.float32))

    def forward():
        arrived, plan = yield from lane_comm.exchange.dispatch(rows, route)
        return (yield from lane_comm.exchange.combine(arrived, plan)).rows

    return route, finish(forward())


# One rank


@pytest.mark.parametrize(("hops", "kind"), [(1, OneHop), (2, TwoHops)])
def test_the_exchange_has_the_hops_of_the_job(hops, kind):
    routes = []
    lane_comm = make(MPI.COMM_SELF, hops=hops, on_route=routes.append)
    assert isinstance(lane_comm.exchange, kind)
    rows = np.arange(3 * SMALL.width, dtype=np.float32).reshape(3, -1)
    route, combined = dispatch_and_combine(lane_comm, 2, rows)
    np.testing.assert_array_equal(combined, rows)
    assert routes == [route]
    assert lane_comm.exchange.expert_load[2].tolist() == [3, 0, 0, 3]


def test_a_rank_alone_has_a_group_a_stage_and_a_link_of_one():
    lane_comm = make(MPI.COMM_SELF)
    assert (lane_comm.tensor.size, lane_comm.stage.size, lane_comm.stage.rank) == (1, 1, 0)
    assert (lane_comm.link.is_first, lane_comm.link.is_last) == (True, True)
    assert type(lane_comm.link) is StageLink
    assert lane_comm.immediate is None


def test_outputs_return_home_without_immediate_routing():
    lane_comm = make(MPI.COMM_SELF)
    assert isinstance(lane_comm.home_combine, HomeCombine)
    assert lane_comm.last_combine(NO_STEP, RowSplit((0,), 1)) is lane_comm.home_combine


def test_sent_rows_are_counted_by_the_lane_s_transfers():
    lane_comm = make(MPI.COMM_SELF)
    dispatch_and_combine(lane_comm, 0, np.ones((3, SMALL.width), np.float32))
    assert lane_comm.transfers.counters["self_messages"] == 2  # there and back
    assert lane_comm.transfers.counters["self_bytes"] == 2 * 6 * SMALL.width * 4
    assert lane_comm.transfers.count_mismatch == 0


@pytest.mark.parametrize(
    ("num_ranks", "parallel", "rank_rows"),
    [
        (2, {}, [10, 10]),
        (4, {"tensor": 2}, [5, 5, 5, 5]),
        (3, {"stages": 2, "stage_ranks": [2, 1]}, [10, 10, 20]),
    ],
)
def test_a_slot_holds_a_multiple_of_the_rows_that_a_rank_sends(num_ranks, parallel, rank_rows):
    grid = layout_of(num_ranks, parallel=parallel).grid
    slots = [slot_rows(SHAPE, grid, rank) for rank in range(num_ranks)]
    assert slots == [SKEW_FACTOR * SHAPE.top_k * rows for rows in rank_rows]


# Several ranks


@pytest.mark.ranks(4)
def test_each_part_joins_the_ranks_of_its_stage_or_its_tensor_group(comm, num_ranks):
    lane_comm = make(comm, parallel={"stages": 2, "tensor": 2})
    assert (lane_comm.stage.size, lane_comm.stage.rank) == (2, comm.rank % 2)
    assert (lane_comm.tensor.size, lane_comm.tensor.part) == (2, comm.rank % 2)
    assert (lane_comm.link.is_first, lane_comm.link.is_last) == (comm.rank < 2, comm.rank >= 2)
    stage = comm.rank // 2
    assert lane_comm.stage.iallreduce_sum([10**comm.rank]).finish().tolist() == [(11, 1100)[stage]]
    rows = np.full((comm.rank + 1, SMALL.width), comm.rank, np.float32)
    _, combined = dispatch_and_combine(lane_comm, (0, 2)[stage], rows)
    np.testing.assert_array_equal(combined, rows)
    assert set(lane_comm.exchange.expert_load) == ({0}, {2, 3})[stage]


@pytest.mark.ranks(4)
def test_rows_to_the_next_stage_and_in_a_tensor_group_are_counted(comm, num_ranks):
    lane_comm = make(comm, parallel={"stages": 2, "tensor": 2})
    sequence = {"requests": 0, "slots": 0, "starts": 0, "lengths": 3, "capacities": 8, "prompts": 3}
    columns = {name: np.array([value]) for name, value in sequence.items()}
    batch, split = replace(NO_STEP, stop=False, **columns), RowSplit((3,), 2)
    if comm.rank < 2:
        lane_comm.link.send(batch, np.ones((3, SMALL.width), np.float32))
        lane_comm.link.wait_for_sends()
    else:
        assert len(lane_comm.link.start_receive().finish().rows) == split.counts[comm.rank - 2]
    own = np.ones((split.counts[comm.rank % 2], SMALL.width), np.float32)
    finish(lane_comm.tensor.all_gather(own, split, Point(0, "gather")))
    counters = lane_comm.transfers.counters
    row_bytes = SMALL.width * 4
    assert counters["stage_network_bytes"] == (len(own) * row_bytes if comm.rank < 2 else 0)
    assert counters["tensor_node_bytes"] == len(own) * row_bytes
    assert (counters["tensor_node_messages"], counters["network_bytes"]) == (1, 0)


@pytest.mark.ranks(4)
def test_two_hops_cross_between_nodes_once(comm, num_ranks):
    lane_comm = make(comm, hops=2)
    rows = np.full((5, SMALL.width), comm.rank, np.float32)
    _, combined = dispatch_and_combine(lane_comm, 0, rows)
    np.testing.assert_array_equal(combined, rows)
    # Experts 0 and 3 are on different nodes: each of a rank's rows crosses once, and one row comes back from there.
    bytes_sent = lane_comm.transfers.counters["network_bytes"]
    assert bytes_sent == 2 * 5 * SMALL.width * 4


@pytest.mark.ranks(4)
def test_the_last_outputs_of_an_immediate_stage_go_to_the_next_stage(comm, num_ranks):
    lane_comm = make(comm, parallel={"stages": 2, "stage_layers": [3, 1]}, exchange={"immediate": True})
    assert isinstance(lane_comm.link, ImmediateLink)
    last_combine = lane_comm.last_combine(NO_STEP, RowSplit((0,), 1))
    if comm.rank < 2:
        assert lane_comm.immediate is lane_comm.link
        assert isinstance(last_combine, ImmediateCombine)
    else:  # the last stage has none after it
        assert lane_comm.immediate is None
        assert last_combine is lane_comm.home_combine


@pytest.mark.ranks(2)
def test_lanes_do_not_meet_each_other_s_messages(comm, num_ranks):
    first, second = make(comm), make(comm)
    rows = np.full((3, SMALL.width), 1 + comm.rank, np.float32)
    # Started in another order on each rank: communicators of their own keep the lanes apart.
    values = [(first, 1), (second, 10)]
    sums = [lane_comm.stage.iallreduce_sum([value]) for lane_comm, value in (values[::-1] if comm.rank else values)]
    assert [transfer.finish().tolist() for transfer in sums] == ([[20], [2]] if comm.rank else [[2], [20]])
    for lane_comm in (first, second):
        np.testing.assert_array_equal(dispatch_and_combine(lane_comm, 0, rows)[1], rows)


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("make_backend", "least_s", "most_s"), [(numpy_backend, 1e-3, 5e-3), (simt_backend, 0.0, 50e-6)]
)
def test_a_rank_sleeps_briefly_while_events_can_start_transfers(comm, monkeypatch, make_backend, least_s, most_s):
    naps = []

    def sleep(seconds):
        if sum(naps) < 0.02 <= sum(naps) + seconds:
            comm.send(None, 0)
        naps.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(transfers_module, "sleep", sleep)
    link = make(comm, make_backend=make_backend, parallel={"stages": 2}).link
    if comm.rank == 0:
        comm.recv(source=1)
        link.stop()
    else:
        assert link.start_receive().finish().batch.stop
        assert least_s <= max(naps) <= most_s
