"""The end of a run: the record of a rank, the report over all ranks, and where the results come from."""

from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
from msgspec import structs

from engine.jobs import make_job
from engine.runs import SMALL
from moempi import __version__
from moempi.backend.cpu.backend import NumpyBackend
from moempi.comm.transfers import WAITS, PendingTransfers, Transfers
from moempi.comm.transports.counted import no_counts
from moempi.engine.balance import Balance
from moempi.engine.earlier import NOTHING_EARLIER, Earlier
from moempi.engine.load import Loading
from moempi.engine.rank_layout import RankLayout
from moempi.engine.recorder import Recorder
from moempi.engine.summary import (
    PACKAGES,
    RankRun,
    gather_records,
    make_provenance,
    rank_record,
    run_report,
    sum_totals,
)
from moempi.layout.layout import make_layout
from moempi.layout.topology import Topology
from moempi.model.router_balance import MODEL_ROUTING, ExpertBias, MoveCounter
from moempi.storage.records import RankRecord
from moempi.storage.results_layout import NOWHERE
from runtime.fake_world import FakeComm

NUM_EXPERTS = SMALL.experts.num
TOPOLOGY = Topology(nodes=(0, 0, 1, 1), islands=(0, 1, 2, 3), switches=(0, 0, 5, 5))
EARLIER = Earlier(
    indices=np.array([1, 2, 3]), finishes=Counter(stop=2, length=1), tokens=70, referenced=3, exact=2, next_step=5
)


def make_recorder(*, steps=0, tokens=0, disk_s=0.0, **finishes):
    recorder = Recorder(None, task="generate", writes_records=True, on_progress=lambda counts: None)
    recorder.steps, recorder.tokens, recorder.disk_s = steps, tokens, disk_s
    recorder.finishes.update(finishes)
    return recorder


def make_lane(*, waits=(0.0, 0.0, 0.0), sent=0, load=(), immediate=None):
    """A lane that has waited, sent `sent` messages over the network, and routed `load` (layer, expert) choices."""
    backend = NumpyBackend(precision="bfloat16")
    transfers = Transfers(backend, PendingTransfers())
    for kind, seconds in zip(WAITS, waits, strict=True):
        transfers.waits[kind] += seconds
    transfers.counters["network_messages"] += sent
    expert_load = {layer: np.zeros(NUM_EXPERTS, np.int64) for layer in SMALL.moe_layers}
    for layer, expert in load:
        expert_load[layer][expert] += 1
    return SimpleNamespace(
        policy=MODEL_ROUTING,
        context=SimpleNamespace(model=SimpleNamespace(architecture=SMALL, backend=backend)),
        comm=SimpleNamespace(
            transfers=transfers, exchange=SimpleNamespace(expert_load=expert_load), immediate=immediate
        ),
    )


def record_of(lanes, *, rank=0, topology=TOPOLOGY, seconds=10.0, recorder=None, balance=None, hops=1, **parallel):
    """The record of one of the ranks of a layout."""
    layout = make_layout(make_job(parallel=parallel), SMALL, topology.nodes)
    ranks = SimpleNamespace(rank=rank)
    rank_layout = RankLayout(ranks, topology, layout, layout.grid.coordinates(rank))
    lanes = SimpleNamespace(each=lanes, balance=balance)
    run = RankRun(rank_layout, lanes, recorder or make_recorder(), Loading(1234, 0.5), seconds=seconds)
    return rank_record(SimpleNamespace(rank=9, host="node-7"), run, hops=hops)


# The record of a rank


def test_a_rank_computed_whenever_it_was_not_blocked():
    lanes = [make_lane(waits=(1.0, 0.25, 0.5)), make_lane(waits=(2.0, 0.0, 0.125))]
    record = record_of(lanes, seconds=10.0, recorder=make_recorder(disk_s=0.0625))
    assert record.seconds == {
        "compute": 10.0 - 3.0 - 0.25 - 0.625 - 0.0625,
        "exchange": 3.0,
        "pipeline": 0.25,
        "idle": 0.625,
        "disk": 0.0625,
    }
    assert sum(record.seconds.values()) == 10.0


def test_counters_and_loads_are_summed_over_the_lanes():
    lanes = [make_lane(sent=3, load=[(0, 1), (3, 0)]), make_lane(sent=4, load=[(0, 1), (2, 3)])]
    record = record_of(lanes)
    assert record.counters == {**no_counts(), "network_messages": 7}
    expected = np.zeros((SMALL.num_layers, NUM_EXPERTS), np.int64)
    expected[0, 1], expected[2, 3], expected[3, 0] = 2, 1, 1
    np.testing.assert_array_equal(record.expert_load, expected)


def test_a_record_names_the_rank_its_host_and_what_it_did():
    record = record_of([make_lane()], recorder=make_recorder(steps=12, tokens=34))
    assert (record.rank, record.host, record.steps, record.tokens) == (9, "node-7", 12, 34)
    assert (record.loaded_bytes, record.loading_s) == (1234, 0.5)


@pytest.mark.parametrize(
    ("rank", "parallel", "position"),
    [
        (0, {}, {"node": 0, "island": 0, "switch": 0, "stage": 0, "data": 0, "tensor": 0}),
        (3, {}, {"node": 1, "island": 3, "switch": 5, "stage": 0, "data": 3, "tensor": 0}),
        (3, {"tensor": 2}, {"node": 1, "island": 3, "switch": 5, "stage": 0, "data": 1, "tensor": 1}),
        (2, {"stages": 2}, {"node": 1, "island": 2, "switch": 5, "stage": 1, "data": 0, "tensor": 0}),
    ],
)
def test_a_record_says_where_the_rank_is(rank, parallel, position):
    record = record_of([make_lane()], rank=rank, **parallel)
    assert record.place == {"seat": rank, **position, "hops": 1, "departs": 0, "row_bytes": 2 * SMALL.width}


def test_unknown_islands_and_switches_are_nowhere():
    place = record_of([make_lane()], topology=Topology(nodes=(0, 0))).place
    assert (place["node"], place["island"], place["switch"]) == (0, NOWHERE, NOWHERE)


def test_a_record_says_how_rows_travel():
    place = record_of([make_lane(immediate=object())], hops=2).place
    assert (place["hops"], place["departs"]) == (2, 1)


def test_a_record_lists_the_experts_that_the_rank_hosts():
    assert record_of([make_lane()], rank=2).hosted == dict.fromkeys(SMALL.moe_layers, (2,))
    staged = record_of([make_lane()], rank=1, stages=2, stage_layers=[2, 2])
    assert staged.hosted == {0: (2, 3)}


def make_moved():
    """A balance of layer 2 that has moved one of two choices."""
    moves, bias = MoveCounter([2], NUM_EXPERTS), ExpertBias([2], NUM_EXPERTS, rate=1.0, bound=9.0)
    moves.count(2, np.array([[0, 3]]), np.array([[0, 1]]))
    bias.update(np.array([[2, 0, 0, 0]]))
    return Balance([MODEL_ROUTING], moves, bias)


def test_a_balanced_rank_records_what_its_routers_preferred_and_how_many_choices_moved():
    record = record_of([make_lane(load=[(2, 0), (2, 1)])], balance=make_moved())
    assert record.balance == {"choices": 2.0, "moved_choices": 1.0}
    assert record.asked_load.tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 1], [0] * 4]


def test_the_bias_is_recorded_by_the_first_rank_of_a_stage_alone():
    of_stage = [
        record_of([make_lane()], rank=rank, balance=make_moved(), stages=2, stage_ranks=[1, 3]) for rank in range(4)
    ]
    assert [record.shifts.any() for record in of_stage] == [True, True, False, False]
    assert of_stage[1].shifts[2].tolist() == [-1, 1, 1, 1]
    of_group = [record_of([make_lane()], rank=rank, balance=make_moved(), tensor=2) for rank in range(4)]
    assert [record.shifts.any() for record in of_group] == [True, False, False, False]


def test_a_rank_that_is_not_balanced_records_nothing_of_it():
    record = record_of([make_lane()])
    assert (record.balance, record.asked_load.size, record.shifts.size) == ({}, 0, 0)


# The report


def report_of_all(comm, record, recorder, *, earlier=NOTHING_EARLIER):
    """The report on rank 0; the totals alone on the others."""
    world = SimpleNamespace(comm=comm)
    totals = sum_totals(recorder, world)
    gathered = gather_records(record, recorder, world)
    if comm.rank > 0:
        assert (gathered.records, sum(map(len, gathered.latencies.values()))) == ([], 0)
        return totals
    return run_report(
        gathered,
        totals,
        earlier=earlier,
        results="out.h5",
        transport="shared  (as the job says)",
        moe_layers=SMALL.moe_layers,
    )


def rank_of(number, *, balance=None, **changes):
    """A rank's record whose figures differ from rank to rank."""
    load = np.zeros((SMALL.num_layers, NUM_EXPERTS), np.int64)
    load[2, number] = 10 + number
    columns = {"asked_load": load + 1, "balance": balance} if balance else {}
    record = RankRecord(
        rank=number,
        host=f"node-{number}",
        expert_load=load,
        seconds={"compute": 5.0 + number, "idle": 2.0 - number},
        loaded_bytes=100 * (number + 1),
        loading_s=0.5 + number,
        steps=3,
        tokens=7 + number,
        counters={"network_bytes": 64 * (number + 1)},
        **columns,
    )
    return structs.replace(record, **changes)


def world_of_one():
    from mpi4py import MPI

    return MPI.COMM_SELF


def test_the_report_of_one_rank_has_its_figures():
    recorder = make_recorder(stop=4, length=1)
    recorder.referenced, recorder.exact = 5, 3
    report = report_of_all(world_of_one(), rank_of(0), recorder)
    assert (report.results, report.transport) == ("out.h5", "shared  (as the job says)")
    assert (report.tokens, report.wall_s, report.seconds) == (7, 7.0, {"compute": [5.0], "idle": [2.0]})
    assert (report.finishes, report.exact, report.referenced, report.num_finished) == (
        {"stop": 4, "length": 1},
        3,
        5,
        5,
    )
    assert (report.hosts, report.loaded_bytes, report.loading_s) == (["node-0"], 100, [0.5])
    assert report.sent == {"network_bytes": 64}
    assert report.expert_load.tolist() == [[0] * 4, [10, 0, 0, 0], [0] * 4]  # MoE layers alone
    assert (report.earlier_requests, report.earlier_tokens) == (0, 0)
    assert (report.asked_load, report.moved) == (None, 0.0)


def test_requests_of_earlier_attempts_are_in_the_totals_and_their_tokens_are_apart():
    recorder = make_recorder(stop=4)
    recorder.add_earlier(EARLIER)
    report = report_of_all(world_of_one(), rank_of(0), recorder, earlier=EARLIER)
    assert report.finishes == {"stop": 6, "length": 1}
    assert (report.num_finished, report.exact, report.referenced) == (7, 2, 3)
    assert (report.tokens, report.earlier_requests, report.earlier_tokens) == (7, 3, 70)


def test_a_balanced_run_reports_the_share_of_choices_that_moved():
    balance = {"choices": 40.0, "moved_choices": 10.0}
    report = report_of_all(world_of_one(), rank_of(0, balance=balance), make_recorder())
    assert report.moved == 0.25
    assert np.isnan(report.logprob_change)
    assert report.asked_load.tolist() == [[1] * 4, [11, 1, 1, 1], [1] * 4]
    measured = {"choices": 0.0, "moved_choices": 0.0, "logprob_change": -0.125}
    report = report_of_all(world_of_one(), rank_of(0, balance=measured), make_recorder())
    assert (report.moved, report.logprob_change) == (0.0, -0.125)


@pytest.mark.ranks(3)
def test_the_report_sums_over_the_ranks_and_keeps_their_seconds_apart(comm, num_ranks):
    recorder = make_recorder(stop=comm.rank, length=1)
    recorder.exact, recorder.referenced = comm.rank, 2
    if comm.rank == 0:
        recorder.add_earlier(EARLIER)
    balance = {"choices": 10.0, "moved_choices": float(comm.rank)}
    record = rank_of(comm.rank, balance=balance)
    if comm.rank == 1:
        record.seconds["idle"] = 8.0
    recorder.latencies["end to end"].update({-3 * comm.rank: 2, 64: 1})
    report = report_of_all(comm, record, recorder, earlier=EARLIER)
    assert report.num_finished == 9
    assert report.finishes == {"stop": 0 + 1 + 2 + 2, "length": 3 + 1}
    if comm.rank > 0:
        return
    assert report.latencies["end to end"] == {50: 1.0, 90: 2.0, 99: 2.0}
    assert (report.tokens, report.wall_s) == (7 + 8 + 9, 6.0 + 8.0)
    assert report.seconds == {"compute": [5.0, 6.0, 7.0], "idle": [2.0, 8.0, 0.0]}
    assert report.finishes == {"stop": 0 + 1 + 2 + 2, "length": 3 + 1}
    assert (report.exact, report.referenced) == (0 + 1 + 2 + 2, 3 * 2 + 3)
    assert (report.hosts, report.loaded_bytes, report.loading_s) == (
        ["node-0", "node-1", "node-2"],
        600,
        [0.5, 1.5, 2.5],
    )
    assert report.sent == {"network_bytes": 64 * 6}
    assert report.expert_load.tolist() == [[0] * 4, [10, 11, 12, 0], [0] * 4]
    assert report.asked_load.tolist() == [[3] * 4, [13, 14, 15, 3], [3] * 4]
    assert report.moved == 3 / 30


# Provenance


# What a world of the mission's size sends


@pytest.mark.parametrize(("rank", "limit_bytes"), [(0, 64 << 20), (1, 1 << 20)])
def test_what_arrives_at_a_rank_of_the_mission_for_the_report(rank, limit_bytes):
    """61 layers of 64 experts, 3,904 ranks, each with latencies in 2,000 buckets and the experts of its layer."""
    comm, shape = FakeComm(rank, 3904), (61, 64)
    load, bias = np.ones(shape, np.int64), np.ones(shape, np.float32)
    balance = {"choices": 1.0, "moved_choices": 1.0}
    record = rank_of(0, expert_load=load, asked_load=load, shifts=bias, hosted={30: (7,)}, balance=balance)
    recorder = make_recorder(stop=1)
    recorder.latencies["end to end"].update(dict.fromkeys(range(2000), 1))
    assert sum_totals(recorder, SimpleNamespace(comm=comm)).num_finished == 3904
    records = gather_records(record, recorder, SimpleNamespace(comm=comm)).records
    assert max(comm.received) <= limit_bytes
    if rank > 0:
        assert (records, sum(comm.received) <= limit_bytes) == ([], True)
    else:
        assert (records[0].expert_load == 3904).all()
        assert len(records) == 3904
        assert not any(one.expert_load.size or one.asked_load.size or one.shifts.size for one in records[1:])


def test_the_provenance_has_the_job_s_text_the_versions_and_the_hosts():
    start = datetime.now(UTC)
    job = SimpleNamespace(run=SimpleNamespace(products="fast"))
    provenance = make_provenance("[model]\n", job, ["node-7"], weights="abc", start=start)
    assert (provenance.job, provenance.weights, provenance.world_size) == ("[model]\n", "abc", 1)
    assert provenance.fast_products
    assert provenance.versions == {"moempi": __version__, **{package: version(package) for package in PACKAGES}}
    assert provenance.hosts == ("node-7",)
    assert start == provenance.start <= provenance.end <= datetime.now(UTC)
