"""Recorded routing of one lane: a record a step, after its last layer, with the rows of the step."""

import numpy as np
import pytest

from moempi.backend.cpu.backend import NumpyBackend
from moempi.comm.batch import NONE, Batch
from moempi.comm.exchange import Route
from moempi.config.job import TraceSection
from moempi.engine.earlier import finished_requests
from moempi.engine.lane_trace import LaneTrace, StepNumbers, TracePlan
from moempi.errors import StorageError
from moempi.storage.journal import JournalReader, JournalWriter

LAYERS, TOP_K = (1, 4), 2
BACKEND = NumpyBackend(precision="float32")


def trace_of(write, *, layers=LAYERS, since=0, first_step=0, stride=1, weights=True):
    section = TraceSection(routing="weights" if weights else "experts")
    plan = TracePlan(section, routed=layers, experts=np.uint16)
    return LaneTrace(plan, write, BACKEND, rank=3, steps=StepNumbers(since, first_step, stride))


def batch_of(requests, starts, lengths, *, prompts=None):
    """A batch of these sequences, each in the slot of its place."""
    return Batch(
        tokens=np.zeros(sum(lengths), np.int64),
        requests=np.array(requests, np.int64),
        slots=np.arange(len(requests)),
        starts=np.array(starts, np.int64),
        lengths=np.array(lengths, np.int64),
        capacities=np.array(starts, np.int64) + lengths,
        logit_rows=NONE,
        freed=NONE,
        prompts=np.array(starts if prompts is None else prompts, np.int64),
    )


def route_of(layer, num_rows, step=0):
    """A route whose values follow from layer, step, row and place."""
    experts = 100 * layer + 10 * step + np.arange(num_rows * TOP_K).reshape(num_rows, TOP_K)
    return Route(layer, experts.astype(np.int64), experts / 2)


def begin_step(trace, batch, rows):
    trace.begin_step(batch, rows, np.repeat(batch.requests, batch.lengths)[rows], batch.positions[rows])


def take_step(trace, batch, rows=None, *, step=0):
    rows = np.arange(batch.num_rows) if rows is None else np.array(rows, np.int64)
    begin_step(trace, batch, rows)
    for layer in LAYERS:
        trace.add_route(route_of(layer, len(rows), step))


TWO = batch_of([7, 2], starts=[5, 0], lengths=[2, 3])


def test_a_record_holds_the_rows_and_the_routes_of_all_layers():
    written = []
    trace = trace_of(written.append, since=6, first_step=8)
    take_step(trace, TWO)
    (record,) = written
    assert (record.since, record.step, record.rank, record.layers) == (6, 8, 3, LAYERS)
    assert record.requests.tolist() == [7, 7, 2, 2, 2]
    assert record.positions.tolist() == [5, 6, 0, 1, 2]
    for layer, experts, weights in zip(LAYERS, record.columns["experts"], record.columns["weights"], strict=True):
        np.testing.assert_array_equal(experts, route_of(layer, 5).experts)
        np.testing.assert_array_equal(weights, route_of(layer, 5).weights.astype(np.float32))


def test_experts_alone_have_the_planned_type_and_no_weights():
    written = []
    take_step(trace_of(written.append, weights=False), TWO)
    assert {name: values.dtype for name, values in written[0].columns.items()} == {"experts": np.uint16}


def test_a_part_of_the_rows_is_recorded_with_its_own_requests_and_positions():
    written = []
    take_step(trace_of(written.append), TWO, rows=[1, 2, 4])
    assert written[0].requests.tolist() == [7, 2, 2]
    assert written[0].positions.tolist() == [6, 0, 2]
    assert written[0].columns["experts"].shape == (2, 3, TOP_K)


def test_a_step_is_written_once_its_last_layer_is_routed_and_not_before():
    written = []
    trace = trace_of(written.append)
    begin_step(trace, TWO, np.arange(5))
    trace.add_route(route_of(1, 5))
    assert written == []
    trace.add_route(route_of(4, 5))
    assert len(written) == 1


def test_a_stage_of_one_routed_layer_writes_with_each_route():
    written = []
    trace = trace_of(written.append, layers=(4,))
    for _ in range(2):
        begin_step(trace, TWO, np.arange(5))
        trace.add_route(route_of(4, 5))
    assert [(record.step, record.layers, len(record.columns["experts"])) for record in written] == [
        (0, (4,), 1),
        (1, (4,), 1),
    ]


@pytest.mark.parametrize(("first_step", "stride", "steps"), [(0, 1, [0, 1, 2]), (11, 3, [11, 14, 17])])
def test_the_steps_of_a_lane_count_from_its_first_step_by_its_stride(first_step, stride, steps):
    written = []
    trace = trace_of(written.append, first_step=first_step, stride=stride)
    for step in range(3):
        take_step(trace, TWO, step=step)
    assert [record.step for record in written] == steps
    for step, record in enumerate(written):
        np.testing.assert_array_equal(record.columns["experts"][0], route_of(1, 5, step).experts)


def test_a_step_without_rows_writes_nothing_but_has_its_number():
    written = []
    trace = trace_of(written.append, first_step=4, stride=2)
    take_step(trace, TWO)
    take_step(trace, TWO, rows=[])
    take_step(trace, batch_of([], [], []))
    take_step(trace, TWO)
    assert [record.step for record in written] == [4, 10]


def test_lanes_of_an_attempt_write_no_step_twice_and_the_next_attempt_follows_them(tmp_path):
    path = tmp_path / "rank.part"
    with JournalWriter(path, fingerprint="run") as journal:
        lanes = [trace_of(journal.append, since=20, first_step=20 + lane, stride=3) for lane in range(3)]
        for trace in (*lanes, *lanes[:2]):
            take_step(trace, TWO)
    with JournalReader(path) as reader:
        assert [record.step for _, record in reader.records()] == [20, 21, 22, 23, 24]
    assert finished_requests([path], "run", 10)[1] == 25


def test_a_disk_that_takes_no_record_is_a_storage_error(tmp_path):
    journal = JournalWriter(tmp_path / "rank.part", fingerprint="run")
    trace = trace_of(journal.append)
    journal.close()
    with pytest.raises(StorageError, match="cannot be written"):
        take_step(trace, TWO)
