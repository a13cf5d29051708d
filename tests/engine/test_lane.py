"""A lane alone: its steps from agreement to sampled tokens, with rows and without, until no work is left or a stop."""

import numpy as np
import pytest

from engine.runs import SMALL, Run, requests_of, tokens_of
from moempi.engine.micro_batches import MicroBatches
from moempi.layout.schedule import AGREE, BEGIN_POINTS, step_points
from moempi.observe.progress import Counts

ONE_LANE = {"micro_batches": 1}


def points_of_step(run, **options):
    stage = run.rank_layout.stage
    is_first, is_last = stage.layers.start == 0, stage.layers.stop == SMALL.num_layers
    options = {"tensor": 1} | options
    options = {"head": options["tensor"] * is_last} | options
    return list(step_points(stage.layers, SMALL.moe_layers, is_first=is_first, **options))


def num_generated(run):
    """Tokens of the first request, which has the first slot."""
    return run.scheduler.sequences.known[0] - len(run.requests[0].prompt_tokens)


def test_a_lane_takes_steps_until_no_request_is_left(tmp_path):
    run = Run(tmp_path, requests_of(4, 9, limit=3), run=ONE_LANE)
    points = list(run.points())
    assert [len(request.tokens) for request in run.requests] == [3, 3]
    assert [request.finish for request in run.requests] == ["length", "length"]
    assert not run.scheduler.num_unfinished
    assert run.recorder.steps == 3  # a prefill of both, then two decodes
    assert run.recorder.counts()[:2] == (2, 6)
    assert points.count(AGREE) == 4


def test_a_lane_without_requests_agrees_once_and_returns(tmp_path):
    run = Run(tmp_path, run=ONE_LANE)
    assert list(run.points()) == [AGREE]
    assert run.recorder.steps == 0


@pytest.mark.parametrize("hops", [1, 2])
def test_a_step_yields_the_points_of_the_schedule(tmp_path, hops):
    run = Run(tmp_path, requests_of(4), run=ONE_LANE, exchange={"hops": hops})
    expected = points_of_step(run)
    assert list(run.lanes.points) == expected
    assert list(run.points()) == expected * 3 + [AGREE]


def test_a_prompt_longer_than_the_batch_is_prefilled_in_several_steps_to_the_same_tokens(tmp_path):
    short = Run(tmp_path, requests_of(30), run=ONE_LANE | {"batch_tokens": 7})
    whole = Run(tmp_path, requests_of(30), run=ONE_LANE | {"batch_tokens": 30})
    for run in (short, whole):
        list(run.points())
    assert (short.recorder.steps, whole.recorder.steps) == (5 + 2, 1 + 2)
    assert tokens_of(short.requests) == tokens_of(whole.requests)


def test_a_requested_stop_ends_the_lane_before_its_next_step(tmp_path):
    run = Run(tmp_path, requests_of(4, limit=5), run=ONE_LANE)
    steps = run.points()
    points = [next(steps) for _ in range(2)]
    run.stop.requested = True
    points += list(steps)
    assert points == [*points_of_step(run), AGREE]  # the step that had begun is taken to its end
    assert (run.recorder.steps, num_generated(run), run.requests[0].finish) == (1, 1, None)
    assert run.scheduler.num_unfinished


def test_a_stop_requested_before_the_first_step_computes_nothing(tmp_path):
    run = Run(tmp_path, requests_of(4), run=ONE_LANE)
    run.stop.requested = True
    assert list(run.points()) == [AGREE]
    assert (run.recorder.steps, run.requests[0].computed) == (0, 0)


@pytest.mark.parametrize(("sent", "received", "missing"), [(3, 1, -2), (1, 3, 2)])
def test_rows_that_one_rank_sends_and_no_other_expects_end_the_run(tmp_path, sent, received, missing):
    run = Run(tmp_path, requests_of(4), run=ONE_LANE)
    steps = run.points()
    for _ in points_of_step(run):
        next(steps)
    run.lanes.each[0].comm.transfers.count_rows(sent=sent, received=received)
    next(steps)  # agrees
    with pytest.raises(RuntimeError, match=f"the ranks expect {missing} rows more than are sent to them"):
        next(steps)


def test_a_lane_ends_with_a_micro_batch_of_its_own(tmp_path):
    run = Run(tmp_path, requests_of(4), run={"micro_batches": 2})
    micro_batches = MicroBatches(2, num_lanes=2)
    busy, idle = (lane.steps(micro_batches) for lane in run.lanes.each)
    assert next(busy).point == AGREE  # and admits the request
    next(busy)
    assert [wait.point for wait in idle] == [AGREE]  # no request is left for its micro-batch
    assert run.recorder.steps == 0
    list(busy)
    assert len(run.requests[0].tokens) == 3


def test_the_recorder_shows_the_sums_of_finished_requests_and_tokens_before_each_step(tmp_path):
    run = Run(tmp_path, requests_of(4, 6, limit=2), run=ONE_LANE)
    list(run.points())
    assert run.progress == [
        Counts(running=2),
        Counts(running=2, prompt_tokens=10, generated=2),
        Counts(finished=2, tokens=4, prompt_tokens=10, generated=4),
    ]
    times = [(request.admitted_at, request.first_token_at) for request in run.requests]
    assert all(0 < admitted < first for admitted, first in times)


def test_scored_prompts_take_every_row_s_logits_and_no_second_step(tmp_path):
    run = Run(tmp_path, requests_of(4, 9, limit=0), task="score", score={"top_n": 2}, run=ONE_LANE)
    list(run.points())
    assert run.recorder.steps == 1
    for request in run.requests:
        record = request.to_record(task="score")
        assert record.finish == "length"
        assert np.isfinite(record.score[1:]).all()
        assert record.score_top_tokens.size == 0


@pytest.mark.ranks(2)
def test_the_stages_of_a_pipeline_take_each_step_together(comm, num_ranks, tmp_path):
    run = Run(tmp_path, requests_of(4, 9), comm=comm, run=ONE_LANE, parallel={"stages": 2})
    points = list(run.points())
    expected = points_of_step(run)
    assert list(run.lanes.points) == expected
    assert points == [*expected * 3, *(point for point in expected if point in BEGIN_POINTS)]
    assert run.recorder.steps == 3
    if comm.rank == 0:
        alone = Run(tmp_path, requests_of(4, 9), run=ONE_LANE)
        list(alone.points())
        assert tokens_of(run.requests) == tokens_of(alone.requests)


@pytest.mark.ranks(2)
def test_a_stop_of_a_later_stage_ends_all_stages_at_a_step_border(comm, num_ranks, tmp_path):
    run = Run(tmp_path, requests_of(4, limit=40), comm=comm, run=ONE_LANE, parallel={"stages": 2})
    run.stop.requested = comm.rank == 1
    run.lanes.run()
    steps = comm.allgather(run.recorder.steps)
    assert steps[0] == steps[1] < 40
    if comm.rank == 0:
        assert num_generated(run) == steps[0]
        assert run.requests[0].finish is None


@pytest.mark.ranks(3)
def test_a_rank_without_requests_takes_every_step_with_no_rows(comm, num_ranks, tmp_path):
    run = Run(tmp_path, requests_of(4, 9), comm=comm, run=ONE_LANE)
    assert len(run.requests) == (1, 1, 0)[comm.rank]
    assert list(run.points()) == points_of_step(run) * 3 + [AGREE]
    assert run.recorder.steps == 3
    alone = Run(tmp_path, requests_of(4, 9), run=ONE_LANE)
    list(alone.points())
    assert tokens_of(run.requests) == tokens_of(alone.requests)[comm.rank :: 3]


@pytest.mark.ranks(2)
def test_a_tensor_group_samples_each_row_once_and_yields_where_it_moves_rows(comm, num_ranks, tmp_path):
    run = Run(tmp_path, requests_of(4, 9, 1), comm=comm, run=ONE_LANE, parallel={"tensor": 2})
    assert list(run.points()) == points_of_step(run, tensor=2) * 3 + [AGREE]
    assert len({str(tokens) for tokens in comm.allgather(tokens_of(run.requests))}) == 1
    alone = Run(tmp_path, requests_of(4, 9, 1), run=ONE_LANE)
    list(alone.points())
    assert tokens_of(run.requests) == tokens_of(alone.requests)
