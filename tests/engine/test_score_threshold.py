"""All tokens above a log-probability at every position of scored prompts, beside the likeliest or instead of them."""

import json

import h5py
import numpy as np
import pytest
from msgspec import structs

from engine.jobs import make_job
from engine.runs import SMALL
from engine.test_score_trace import LENGTHS, scored
from moempi import Results
from moempi.config.traces import most_above, recorded_bytes
from moempi.storage.export_arrays import export_npz, export_parquet, export_safetensors
from moempi.storage.journal import JournalReader, JournalWriter
from moempi.storage.merge import merge
from moempi.storage.records import RequestRecord, TraceRecord, decode, encode
from storage.test_results import PROVENANCE

THRESHOLD = -3.7
LAYOUTS = [{}, {"parallel": {"stages": 2}}, {"parallel": {"tensor": 2, "stages": 2}}, {"exchange": {"hops": 2}}]
ON_TWO_NODES = {"topology": {"ranks_per_node": 2}}


def read(results):
    with h5py.File(results) as file:
        return {name: file[f"score/above/{name}"][:] for name in ("offsets", "tokens", "logprobs")}


def whole(results):
    """All log-probabilities (n, V) of a file that has the likeliest tokens in the number of the vocabulary."""
    with h5py.File(results) as file:
        tokens, logprobs = file["score/top_tokens"][:], file["score/top_logprobs"][:]
    found = np.full(logprobs.shape, -np.inf, np.float32)
    rows = np.flatnonzero(tokens[:, 0] >= 0)
    found[rows[:, None], tokens[rows]] = logprobs[rows]
    return found


def test_they_are_the_tokens_above_it_of_all_tokens(tmp_path):
    results = scored(tmp_path, score={"top_n": SMALL.vocab_size, "threshold": THRESHOLD})
    found, expected = read(results), whole(results)
    rows, tokens = np.nonzero(expected > THRESHOLD)
    np.testing.assert_array_equal(np.diff(found["offsets"]), (expected > THRESHOLD).sum(axis=1))
    np.testing.assert_array_equal(found["tokens"], tokens)
    np.testing.assert_array_equal(found["logprobs"], expected[rows, tokens])
    assert 0 < len(tokens) < expected.size


def test_they_are_the_same_without_the_likeliest_and_rounded_to_float16(tmp_path):
    beside = read(scored(tmp_path / "beside", score={"top_n": 2, "threshold": THRESHOLD}))
    alone = scored(tmp_path / "alone", score={"threshold": THRESHOLD, "dtype": "float16"})
    for name, values in read(alone).items():
        np.testing.assert_array_equal(values, beside[name].astype(values.dtype))
    with h5py.File(alone) as file:
        assert "score/top_tokens" not in file
        assert file["score/above/logprobs"].dtype == np.float16


@pytest.mark.ranks(4)
@pytest.mark.parametrize("sections", LAYOUTS, ids=["ranks", "stages", "tensor", "hops"])
def test_any_layout_records_the_tokens_of_one_rank(tmp_path, comm, sections):
    folder, score = comm.bcast(tmp_path), {"threshold": THRESHOLD}
    results = scored(folder / "ranks", comm, score=score, **(ON_TWO_NODES | sections))
    if comm.rank == 0:
        found, alone = read(results), read(scored(folder / "alone", score=score))
        if "tensor" in str(sections) or "hops" in str(sections):
            assert abs(len(found["tokens"]) - len(alone["tokens"])) <= 2
        else:
            for name, values in alone.items():
                np.testing.assert_array_equal(found[name], values)


def test_results_and_exports_have_them_by_request(tmp_path):
    results = scored(tmp_path, score={"threshold": THRESHOLD})
    found, first = read(results), np.cumsum([0, *LENGTHS])
    with Results(results) as file:
        of_requests = [result.above for result in file]
    for index, above in enumerate(of_requests):
        bounds = found["offsets"][first[index] : first[index + 1] + 1]
        np.testing.assert_array_equal(above.offsets, bounds - bounds[0])
        np.testing.assert_array_equal(above.tokens, found["tokens"][bounds[0] : bounds[-1]])
    export_npz(results, tmp_path / "out.npz")
    export_safetensors(results, tmp_path / "out.safetensors")
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_array_equal(file["1.score_above_offsets"], of_requests[1].offsets)
        np.testing.assert_array_equal(file["1.score_above_logprobs"], of_requests[1].logprobs)
    header = (tmp_path / "out.safetensors").read_bytes()
    entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    assert entries["3.score_above_tokens"]["shape"] == [len(of_requests[3].tokens)]
    parquet = pytest.importorskip("pyarrow.parquet")
    export_parquet(results, tmp_path / "out.parquet")
    column = parquet.read_table(tmp_path / "out.parquet")["score_above_tokens"].to_pylist()
    assert column == [above.tokens.tolist() for above in of_requests]


def above_of(requests, positions, counts, *, since, first):
    total = sum(counts)
    return TraceRecord(
        table="above",
        since=since,
        step=since,
        rank=0,
        layers=(),
        requests=np.array(requests, np.int64),
        positions=np.array(positions, np.int32),
        columns={
            "counts": np.array(counts, np.int32),
            "tokens": np.arange(first, first + total, dtype=np.int32),
            "logprobs": -np.arange(first, first + total, dtype=np.float32),
        },
    )


def request_of(index, tokens, *, since):
    prompt = np.arange(tokens, dtype=np.int32)
    score = np.array([np.nan, *[-1.0] * (tokens - 1)], np.float32)
    return RequestRecord(
        index=index, id=f"{index}", finish="length", computed=tokens - 1, since=since, prompt=prompt, score=score
    )


def test_rows_of_the_latest_attempt_alone_are_kept_in_any_order(tmp_path):
    with JournalWriter(tmp_path / "0.part", fingerprint="run") as journal:
        for record in (
            above_of([1, 1], [1, 2], [4, 1], since=0, first=100),  # an attempt that was interrupted
            above_of([1, 0, 1], [2, 2, 1], [1, 0, 2], since=5, first=10),
            above_of([0], [1], [3], since=5, first=20),
            above_of([0], [9], [2], since=5, first=90),  # no position of the request
            request_of(0, 3, since=5),
            request_of(1, 3, since=5),
        ):
            journal.append(record)
    assert merge(tmp_path / "r.h5", [tmp_path / "0.part"], num_requests=2, provenance=PROVENANCE) == []
    found = read(tmp_path / "r.h5")
    assert found["offsets"].tolist() == [0, 0, 3, 3, 3, 5, 6]
    assert found["tokens"].tolist() == [20, 21, 22, 11, 12, 10]
    assert found["logprobs"].tolist() == [-20, -21, -22, -11, -12, -10]


def test_a_lost_row_is_reported_and_has_no_tokens(tmp_path):
    with JournalWriter(tmp_path / "0.part", fingerprint="run") as journal:
        for record in (above_of([0], [2], [2], since=0, first=1), request_of(0, 3, since=0)):
            journal.append(record)
    (problem,) = merge(tmp_path / "r.h5", [tmp_path / "0.part"], num_requests=1, provenance=PROVENANCE)
    assert "1 of 1 requests lack recorded rows" in problem.sentence
    assert read(tmp_path / "r.h5")["offsets"].tolist() == [0, 0, 0, 2]


def merged(folder, *records, num_requests):
    """The problems of a merge of these records, and the tokens of each row."""
    with JournalWriter(folder / "0.part", fingerprint="run") as journal:
        for record in records:
            journal.append(record)
    problems = merge(folder / "r.h5", [folder / "0.part"], num_requests=num_requests, provenance=PROVENANCE)
    found = read(folder / "r.h5")
    np.testing.assert_array_equal(found["logprobs"], -found["tokens"].astype(np.float32))
    return problems, [row.tolist() for row in np.split(found["tokens"], found["offsets"][1:-1])]


@pytest.mark.parametrize("counts", [[2, 1, 3], [2, 4, 3], [2, 0, 3]])
def test_a_row_that_two_records_contradict_leaves_its_neighbours_whole(tmp_path, counts):
    records = [
        above_of([0, 0, 1], [1, 2, 1], [1, 1, 1], since=0, first=1),
        above_of([1, 1, 1], [2, 3, 4], counts, since=0, first=10),
        above_of([1], [3], [2], since=0, first=30),
        request_of(0, 3, since=0),
        request_of(1, 5, since=0),
    ]
    problems, rows = merged(tmp_path, *records, num_requests=2)
    last = 10 + counts[0] + counts[1]
    assert rows == [[], [1], [2], [], [3], [10, 11], [30, 31], [last, last + 1, last + 2]]
    assert problems == []


@pytest.mark.parametrize("count", [1, 2])
def test_two_records_of_a_row_do_not_hide_that_another_is_lost(tmp_path, count):
    records = [
        above_of([0, 0], [1, 2], [2, 2], since=0, first=1),
        above_of([0], [2], [count], since=0, first=20),
        request_of(0, 4, since=0),
    ]
    (problem,), rows = merged(tmp_path, *records, num_requests=1)
    assert "1 of 1 requests lack recorded rows" in problem.sentence
    assert rows == [[], [1, 2], list(range(20, 20 + count)), []]


@pytest.mark.parametrize("counts", [[3, 3], [-1, 6]])
def test_a_record_whose_counts_do_not_fit_is_refused(counts):
    sound = above_of([0, 0], [1, 2], [2, 3], since=0, first=0)
    record = structs.replace(sound, columns=sound.columns | {"counts": np.array(counts, np.int32)})
    with pytest.raises(ValueError, match=r"above has no counts|tokens is int32"):
        decode(encode(record))


def test_the_journal_holds_each_position_once_and_the_foretold_bytes_bound_it(tmp_path):
    results = scored(tmp_path, score={"threshold": THRESHOLD})
    with JournalReader(tmp_path / "0.part") as journal:
        traces = [record for _, record in journal.records() if isinstance(record, TraceRecord)]
    pairs = [pair for record in traces for pair in zip(record.requests, record.positions, strict=True)]
    assert sorted(pairs) == [(i, p) for i, length in enumerate(LENGTHS) for p in range(1, length)]
    job = make_job(tmp_path / "job", task="score", score={"threshold": THRESHOLD})
    most = recorded_bytes(job, SMALL)["above"]
    assert most == 8 + 8 * most_above(THRESHOLD, SMALL.vocab_size)
    found = read(results)
    assert np.diff(found["offsets"]).max() <= most_above(THRESHOLD, SMALL.vocab_size)


@pytest.mark.parametrize(
    ("threshold", "most"), [(0.0, 0), (-0.5, 1), (-1.0, 2), (-3.0, 20), (-3.7, 40), (-1000.0, 40), (-10_000.0, 40)]
)
def test_as_many_tokens_are_above_a_threshold_as_probabilities_add_up_to_1(threshold, most):
    assert most_above(threshold, 40) == most
