"""Recorded routing in the results file: each request has the rows of the attempt that finished it, once."""

import h5py
import numpy as np
import pytest
from msgspec import structs

from moempi.storage import journal_index
from moempi.storage.merge import merge
from moempi.storage.records import TraceRecord
from storage.test_records import make_rank, make_request
from storage.test_results import PROVENANCE, merged, write_journals

TOP_K = 2


def make_routing(step, tokens, *, since=0, layers=(1, 3), rank=0):
    """A record whose experts encode request, position and layer, and whose weights encode the attempt."""
    requests, positions = (np.array(column) for column in zip(*tokens, strict=True))
    layer = np.array(layers)[:, None, None]
    experts = 100 * requests[None, :, None] + 10 * positions[None, :, None] + layer + 1000 * np.arange(TOP_K)
    return TraceRecord(
        table="routing",
        home=True,
        since=since,
        step=step,
        rank=rank,
        layers=tuple(layers),
        requests=requests.astype(np.int64),
        positions=positions.astype(np.int32),
        columns={"experts": experts.astype(np.int32), "weights": np.full(experts.shape, since + 0.5, np.float32)},
    )


def read(path):
    with h5py.File(path) as file:
        return {name: dataset[:] for name, dataset in file["routing"].items()}


def test_a_request_has_the_rows_of_the_attempt_that_finished_it(tmp_path):
    first = [make_routing(0, [(0, 0), (1, 0)]), make_routing(2, [(0, 1), (1, 1)]), make_routing(3, [(1, 2), (1, 3)])]
    second = [
        make_routing(4, [(1, 0), (1, 1)], since=4, layers=(1,), rank=1),
        make_routing(5, [(1, 2)], since=4, layers=(1,), rank=1),
    ]
    third = [make_routing(6, [(1, 0), (1, 1)], since=6), make_routing(7, [(1, 2)], since=6)]
    done = [make_request(0, computed=2), make_request(1, computed=3)]
    path = merged(tmp_path / "r.h5", [*third, done[1]], second, [*first, done[0], make_rank(0)], num_requests=2)
    found = read(path)
    assert found["offsets"].tolist() == [0, 2, 5]
    assert found["layer"].tolist() == [1, 3]
    assert found["experts"][:, :, 0].tolist() == [[1, 3], [11, 13], [101, 103], [111, 113], [121, 123]]
    assert found["experts"][:, :, 1].tolist() == (found["experts"][:, :, 0] + 1000).tolist()
    assert found["weights"][:, 0, 0].tolist() == [0.5, 0.5, 6.5, 6.5, 6.5]
    assert found["step"].tolist() == [0, 2, 6, 6, 7]
    assert found["row"][:, 1].tolist() == [0, 0, 0, 1, 0]


def test_stages_and_tensor_groups_write_their_own_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_index, "BLOCK_BYTES", 40)
    one = [make_routing(step, [(step, 0), (step, 2)], layers=(1,), rank=0) for step in range(4)]
    other = [make_routing(step, [(step, 1)], layers=(1,), rank=1) for step in range(4)]
    last = [make_routing(step, [(step, p) for p in range(3)], layers=(2, 5), rank=2) for step in range(3)]
    done = [make_request(i, computed=3) for i in range(4)]
    found = read(merged(tmp_path / "r.h5", [*one, *done], other, last, num_requests=4))
    assert found["layer"].tolist() == [1, 2, 5]
    assert found["experts"][:9, 2, 0].tolist() == [100 * i + 10 * p + 5 for i in range(3) for p in range(3)]
    assert found["rank"][:, 0].tolist() == [0, 1, 0] * 4
    # Rows that were lost with a node read as the fill value.
    assert (found["experts"][9:, 1:] == -1).all()
    assert np.isnan(found["weights"][9:, 1:]).all()
    assert (found["rank"][9:, 1:] == -1).all()


def test_requests_that_computed_nothing_have_no_rows(tmp_path):
    done = [make_request(0, finish="error"), make_request(1, computed=1)]
    found = read(merged(tmp_path / "r.h5", [make_routing(0, [(1, 0)]), *done], num_requests=2))
    assert found["offsets"].tolist() == [0, 0, 1]


def test_layers_that_are_not_neighbours_are_written_to_their_own_columns(tmp_path):
    records = [make_routing(0, [(0, 0)], layers=(1, 5)), make_routing(0, [(0, 0)], layers=(3,), rank=1)]
    found = read(merged(tmp_path / "r.h5", [*records, make_request(0, computed=1)], num_requests=1))
    assert found["experts"][0, :, 0].tolist() == [1, 3, 5]


def lacking(path, *records_by_rank, num_requests):
    """The sentences of the merge's problems."""
    journals = write_journals(path, *records_by_rank)
    return [str(problem) for problem in merge(path, journals, num_requests=num_requests, provenance=PROVENANCE)]


def test_requests_that_lack_rows_of_their_last_attempt_are_counted(tmp_path):
    whole = [make_routing(0, [(0, 0), (0, 1)]), make_request(0, computed=2)]
    early = [make_routing(0, [(1, 0), (1, 1)])]
    done = make_request(1, computed=2, since=3)
    last = [make_routing(3, [(1, 0), (1, 1)], since=3)]
    torn = "1 of 2 requests lack recorded rows"
    assert lacking(tmp_path / "r.h5", [*whole, *early, done], last, num_requests=2) == []
    # A position, a layer, and an attempt that is not there.
    few = [make_routing(3, [(1, 0)], since=3)]
    one_layer = [make_routing(3, [(1, 0), (1, 1)], since=3, layers=(1,))]
    for number, rows in enumerate((few, one_layer, [])):
        path = tmp_path / f"{number}.h5"
        assert lacking(path, [*whole, *early, done], rows, num_requests=2) == [f"{path}: {torn}"]


def test_the_first_position_of_a_scored_prompt_has_no_row(tmp_path):
    top = {"top_tokens": np.zeros((2, 1), np.int32), "top_logprobs": np.zeros((2, 1), np.float32)}
    scored, single = (make_request(i, num_prompt=n, num_tokens=0, score_top=0) for i, n in enumerate((3, 1)))
    rows = TraceRecord(
        table="score",
        since=0,
        step=0,
        rank=0,
        layers=(),
        requests=np.zeros(2, np.int64),
        positions=np.array([1, 2], np.int32),
        columns=top,
    )
    assert lacking(tmp_path / "r.h5", [scored, single, rows], num_requests=2) == []
    half = structs.replace(
        rows,
        requests=rows.requests[:1],
        positions=rows.positions[:1],
        columns={name: values[:1] for name, values in top.items()},
    )
    path = tmp_path / "half.h5"
    found = lacking(path, [scored, single, half], num_requests=2)
    assert found == [f"{path}: 1 of 2 requests lack recorded rows"]


@pytest.mark.parametrize("block_bytes", [1, journal_index.BLOCK_BYTES])
def test_a_row_that_several_records_have_does_not_hide_that_another_is_lost(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(journal_index, "BLOCK_BYTES", block_bytes)
    done, one = make_request(0, computed=3), [make_routing(0, [(0, 0)]), make_routing(1, [(0, 0), (0, 2)])]
    path = tmp_path / "twice.h5"
    assert lacking(path, [*one, *one, done], one, num_requests=1) == [f"{path}: 1 of 1 requests lack recorded rows"]
    assert read(path)["experts"][:, 0, 0].tolist() == [1, -1, 21]
    other = [make_routing(2, [(0, 1), (0, 2)])]
    assert lacking(tmp_path / "whole.h5", [*one, *other, done], one, num_requests=1) == []
    assert read(tmp_path / "whole.h5")["experts"][:, 0, 0].tolist() == [1, 11, 21]


def test_rows_of_each_set_of_layers_count_for_themselves(tmp_path):
    done, positions = make_request(0, computed=2), [(0, 0), (0, 1)]
    first, last = (make_routing(0, positions, layers=layers) for layers in ((1,), (3,)))
    assert lacking(tmp_path / "r.h5", [first, last, done], num_requests=1) == []
    path = tmp_path / "one.h5"
    half = make_routing(0, positions[:1], layers=(3,))
    assert lacking(path, [first, first, half, half, done], num_requests=1) == [
        f"{path}: 1 of 1 requests lack recorded rows"
    ]
