"""The lanes of one rank: made from a job, interleaved until all requests are finished, whatever their number."""

import numpy as np
import pytest

from engine.runs import SMALL, Run, requests_of, tokens_of
from moempi.comm.select_transport import ChosenTransport
from moempi.layout.schedule import step_points
from moempi.model.router_balance import MODEL_ROUTING, BiasPolicy, CapacityPolicy
from moempi.storage.journal import JournalReader
from moempi.storage.records import TraceRecord

LENGTHS = (5, 3, 30, 1, 12)


def loads(run):
    """Choices of each lane in each layer."""
    return [
        {layer: int(load.sum()) for layer, load in lane.comm.exchange.expert_load.items()} for lane in run.lanes.each
    ]


def test_a_run_finishes_all_requests_and_returns_its_seconds(tmp_path):
    run = Run(tmp_path, requests_of(*LENGTHS))
    seconds = run.lanes.run()
    assert 0.0 < seconds < 60.0
    assert [request.finish for request in run.requests] == ["length"] * len(LENGTHS)
    assert run.recorder.counts()[:2] == (len(LENGTHS), 3 * len(LENGTHS))
    assert run.progress[-1] == run.recorder.counts()


def test_the_watchdog_knows_the_lane_and_the_layer_of_every_point(tmp_path, monkeypatch):
    run = Run(tmp_path, requests_of(4, 5, limit=1))
    places = []
    monkeypatch.setattr(run.world, "alive", places.append)
    run.lanes.run()
    points = ["agree", *(f"layer {point.layer} {point.phase}" for point in run.lanes.points[1:])]
    of_lanes = [[place for place in places if place.endswith(f"lane {lane}")] for lane in (0, 1)]
    assert of_lanes == [[f"{point}, lane {lane}" for point in (*points, "agree")] for lane in (0, 1)]


def test_the_waits_of_a_run_are_no_longer_than_the_run(tmp_path):
    run = Run(tmp_path, requests_of(*LENGTHS))
    seconds = run.lanes.run()
    assert 0.0 <= sum(sum(lane.comm.transfers.waits.values()) for lane in run.lanes.each) <= seconds


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_any_number_of_lanes_shares_the_requests_and_generates_the_same_tokens(tmp_path, lanes):
    expected = Run(tmp_path, requests_of(*LENGTHS), run={"micro_batches": 1})
    expected.lanes.run()
    run = Run(tmp_path, requests_of(*LENGTHS), run={"micro_batches": lanes})
    assert [lane.index for lane in run.lanes.each] == list(range(lanes))
    run.lanes.run()
    assert tokens_of(run.requests) == tokens_of(expected.requests)
    top_k, computed = SMALL.experts.router.top_k, sum(LENGTHS) + 2 * len(LENGTHS)
    total = dict.fromkeys(SMALL.moe_layers, 0)
    for of_lane in loads(run):
        assert all(of_lane.values())  # every lane has computed
        total = {layer: total[layer] + count for layer, count in of_lane.items()}
    assert set(total.values()) == {top_k * computed}


@pytest.mark.parametrize("overlap", [True, False])
def test_overlap_changes_when_the_host_waits_and_no_token(tmp_path, overlap):
    run = Run(tmp_path, requests_of(*LENGTHS), run={"overlap": overlap})
    run.lanes.run()
    expected = Run(tmp_path, requests_of(*LENGTHS))
    expected.lanes.run()
    assert tokens_of(run.requests) == tokens_of(expected.requests)


def test_chosen_lanes_run_alone(tmp_path):
    run = Run(tmp_path, requests_of(*LENGTHS))
    assert run.lanes.run(run.lanes.each[1:]) > 0.0
    assert [request.finish for request in run.requests] == ["length"] * len(LENGTHS)
    first, second = loads(run)
    assert not any(first.values())
    assert all(second.values())


def test_lanes_can_run_again_when_requests_are_submitted(tmp_path):
    run = Run(tmp_path, requests_of(4))
    run.lanes.run()
    more = requests_of(4, 7)
    run.scheduler.submit(more, count=len(more))
    run.lanes.run()
    assert tokens_of(more)[0] == tokens_of(run.requests)[0]
    assert all(request.finish == "length" for request in more)


def test_every_lane_has_transfers_and_an_exchange_of_its_own_and_shares_the_rest(tmp_path):
    first, second = Run(tmp_path).lanes.each
    assert first.context is second.context
    assert first.comm.transfers is not second.comm.transfers
    assert first.comm.exchange is not second.comm.exchange
    assert (first.policy, second.policy, first.trace) == (MODEL_ROUTING, MODEL_ROUTING, None)


@pytest.mark.parametrize("transport", ["auto", "alltoallv", "shared"])
def test_the_rows_of_a_rank_alone_in_its_stage_stay_there(tmp_path, transport):
    run = Run(tmp_path, requests_of(3), exchange={"transport": transport, "hops": 2, "verify": True})
    assert run.lanes.transport == ChosenTransport("loopback", "each stage has one rank")
    assert run.lanes.points == step_points(range(SMALL.num_layers), SMALL.moe_layers, tensor=1, is_first=True, head=1)
    run.lanes.run()
    assert len(run.requests[0].tokens) == 3


@pytest.mark.parametrize(("mode", "kind"), [("bias", BiasPolicy), ("capacity", CapacityPolicy)])
def test_each_lane_has_the_policy_of_the_job_s_balance(tmp_path, mode, kind):
    run = Run(tmp_path, requests_of(*LENGTHS), balance={"mode": mode})
    assert [lane.policy for lane in run.lanes.each] == run.lanes.balance.policies
    assert all(isinstance(lane.policy, kind) for lane in run.lanes.each)
    run.lanes.run()
    assert sum(map(np.sum, run.lanes.balance.moves.preferred.values())) == sum(
        sum(load.values()) for load in loads(run)
    )


def test_a_run_ends_with_the_last_step_s_load_in_the_bias(tmp_path):
    run = Run(tmp_path, requests_of(20, limit=1), run={"micro_batches": 1}, balance={"mode": "bias"})
    run.lanes.run()
    assert run.recorder.steps == 1
    assert run.lanes.balance.expert_bias.values.any()


def test_a_job_without_balance_has_none(tmp_path):
    assert Run(tmp_path).lanes.balance is None


def test_the_recorded_steps_of_the_lanes_differ_and_cover_every_computed_token(tmp_path):
    run = Run(tmp_path, requests_of(*LENGTHS), trace={"routing": True})
    run.lanes.run()
    run.journal.close()
    with JournalReader(run.journal.path) as journal:
        records = [record for _, record in journal.records() if isinstance(record, TraceRecord)]
    steps = [record.step for record in records]
    assert len(set(steps)) == len(steps)
    assert {step % 2 for step in steps} == {0, 1}
    assert {record.layers for record in records} == {tuple(SMALL.moe_layers)}
    assert sum(len(record.positions) for record in records) == sum(LENGTHS) + 2 * len(LENGTHS)
