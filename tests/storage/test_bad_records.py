"""Whole records that cannot be used, as a fault of the program or another version writes them: each is lost alone."""

import random

import msgspec
import numpy as np
import pytest

from moempi.engine.earlier import finished_requests
from moempi.errors import StorageError
from moempi.storage.journal import journal_path
from moempi.storage.merge import merge
from moempi.storage.records import encode
from storage.test_journal_damage import frame
from storage.test_records import make_rank, make_request, write_journal
from storage.test_results import PROVENANCE, read
from storage.test_traces import make_routing

REQUEST = make_request(2, top=2, score_top=1, computed=4)
ROUTING = make_routing(1, [(2, 0), (2, 1)])
NUM_REQUESTS = 3
BAD_REQUESTS = {
    "of a request beyond the job": {"index": 3},
    "of a negative request": {"index": -1},
    "of request 2**64 - 1": {"index": 2**64 - 1},
    "without an id": {"id": None},
    "with another finish": {"finish": "perhaps"},
    "with fewer logprobs": {"logprobs": ("<f4", (1,), bytes(4))},
    "with wider tokens": {"tokens": ("<i8", (2,), bytes(16))},
    "with tokens of another byte order": {"tokens": (">i4", (2,), bytes(8))},
    "with top logprobs of another width": {"top_logprobs": ("<f4", (2, 1), bytes(8))},
    "with objects": {"tokens": ("O", (2,), bytes(16))},
    "with a type that is no type": {"tokens": ("i4,(2", (2,), bytes(8))},
    "with a number for an array": {"tokens": ("<i4", (), bytes(4))},
    "with more bytes than its shape": {"prompt": ("<i4", (3,), bytes(16))},
    "with more computed positions than tokens": {"computed": 6},
    "of a negative number of computed positions": {"computed": -1},
    "of another kind": {"type": "another"},
    "nested deeply": {"tokens": None},
}
BAD_RANKS = {
    "with a load of floats": {"expert_load": ("<f4", (2, 3), bytes(24))},
    "with other experts": {"expert_load": ("<i8", (2, 2), bytes(32))},
    "with steps beyond int64": {"steps": 2**64 - 1},
    "with bytes beyond int64": {"counters": {"self_bytes": 2**63}},
    "with experts beyond int32": {"hosted": {1: [2**31]}},
    "with a path for a name": {"seconds": {"../compute": 1.0}},
}
BAD_ROUTINGS = {
    "of a request beyond the job": {"requests": ("<i8", (2,), np.array([2, 3]).tobytes())},
    "at a negative position": {"positions": ("<i4", (2,), np.array([0, -1], np.int32).tobytes())},
    "of fewer experts": {
        "columns": {"experts": ("<i4", (2, 2, 1), bytes(16)), "weights": ("<f4", (2, 2, 1), bytes(16))}
    },
    "of fewer weights": {
        "columns": {"experts": ("<i4", (2, 2, 2), bytes(32)), "weights": ("<f4", (2, 2, 1), bytes(16))}
    },
    "of experts of no slot": {"columns": {"experts": ("<i4", (2, 2), bytes(16))}},
    "of other columns": {"columns": {"experts": ("<i4", (2, 2, 2), bytes(32))}},
    "with a column of another table": {"columns": {"values": ("<f4", (2, 2, 2), bytes(32))}},
    "with a column that the merge makes": {"columns": {"row": ("<i4", (2, 2), bytes(16))}},
    "of an unknown table": {"table": "routings"},
    "of descending layers": {"layers": [3, 1]},
    "of a negative step": {"step": -1},
}


def payload_of(record, changes):
    """The bytes of a record with other values for some of its fields, which no constructor checked."""
    payload = msgspec.msgpack.encode(msgspec.msgpack.decode(encode(record)) | changes)
    if changes.get("tokens", ...) is None:
        return payload.replace(b"\xa6tokens\xc0", b"\xa6tokens" + b"\x91" * 5000 + b"\xc0")
    return payload


def journal_of(results, *payloads):
    """A journal of two sound requests and a sound rank, with `payloads` in their midst; and the offset of these."""
    path = write_journal(journal_path(results, 0), [make_request(0), make_routing(0, [(0, 0)]), make_rank(0)])
    offset = path.stat().st_size
    after = (*payloads, encode(make_request(1)))
    path.write_bytes(path.read_bytes() + b"".join(map(frame, after)))
    return path, offset


def merge_of(results, *paths):
    """The problems but one: request 2 has fewer recorded rows than computed tokens (see test_traces.py)."""
    problems = map(str, merge(results, paths, num_requests=NUM_REQUESTS, provenance=PROVENANCE))
    return [problem for problem in problems if problem != f"{results}: 1 of {NUM_REQUESTS} requests lack recorded rows"]


@pytest.mark.parametrize("changes", BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_a_bad_request_is_computed_again_and_reported(tmp_path, changes):
    results = tmp_path / "r.h5"
    path, offset = journal_of(results, payload_of(REQUEST, changes))
    finished, _, problems = finished_requests([path], "run", NUM_REQUESTS)
    assert finished["index"].tolist() == [0, 1]
    assert [str(problem).startswith(f"{path} holds a record at byte {offset} that cannot") for problem in problems] == [
        True
    ]
    with pytest.raises(StorageError, match=f"1 of 3 requests have no record.*at byte {offset}.*run the same job again"):
        merge_of(results, path)
    again = write_journal(journal_path(results, 1), [REQUEST])
    assert merge_of(results, path, again) == list(map(str, problems))
    assert [record.id for record in read(results)] == ["request-0", "request-1", "request-2"]


@pytest.mark.parametrize("octets", [b"\xff", b"\xed\xa0\x80"])
def test_a_text_that_is_not_utf_8_is_a_bad_request(tmp_path, octets):
    payload = encode(REQUEST).replace(b"\xa9request-2", bytes([0xA0 + len(octets)]) + octets)
    path, _ = journal_of(tmp_path / "r.h5", payload)
    finished, _, problems = finished_requests([path], "run", NUM_REQUESTS)
    assert (finished["index"].tolist(), len(problems)) == ([0, 1], 1)


@pytest.mark.parametrize(
    ("record", "changes"),
    [*((make_rank(1), changes) for changes in BAD_RANKS.values()), *((ROUTING, c) for c in BAD_ROUTINGS.values())],
    ids=[*BAD_RANKS, *BAD_ROUTINGS],
)
def test_a_bad_rank_or_routing_is_passed_over_and_reported(tmp_path, record, changes):
    results = tmp_path / "r.h5"
    path, offset = journal_of(results, payload_of(record, changes), encode(REQUEST))
    (problem,) = merge_of(results, path)
    assert problem.startswith(f"{path} holds a record at byte {offset} that cannot be used: ")
    assert len(read(results)) == NUM_REQUESTS


def test_keys_of_a_later_version_are_no_problem(tmp_path):
    payloads = [payload_of(record, {"later": [1, {"x": None}]}) for record in (REQUEST, ROUTING, make_rank(1))]
    path, _ = journal_of(tmp_path / "r.h5", *payloads)
    assert merge_of(tmp_path / "r.h5", path) == []
    assert finished_requests([path], "run", NUM_REQUESTS)[2] == []


def test_widths_without_values_need_no_space(tmp_path):
    wide = {"computed": 0, "tokens": ("<i4", (0,), b""), "logprobs": ("<f4", (0,), b"")}
    wide |= {name: (kind, (0, 2**40), b"") for name, kind in (("top_tokens", "<i4"), ("top_logprobs", "<f4"))}
    no_rows = {"requests": ("<i8", (0,), b""), "positions": ("<i4", (0,), b"")}
    no_rows["columns"] = {name: (kind, (2, 0, 2**40), b"") for name, kind in (("experts", "<i4"), ("weights", "<f4"))}
    path, _ = journal_of(tmp_path / "r.h5", payload_of(REQUEST, wide), payload_of(ROUTING, no_rows))
    assert merge_of(tmp_path / "r.h5", path) == []


def test_many_bad_records_are_one_sentence(tmp_path):
    path, offset = journal_of(tmp_path / "r.h5", *[payload_of(REQUEST, {"index": 3})] * 5, encode(REQUEST))
    sentence = f"holds a record at byte {offset} that cannot be used: it is of request 3, the job has 3"
    assert merge_of(tmp_path / "r.h5", path) == [f"{path} {sentence} (and 4 more records)"]


@pytest.mark.parametrize(("sinces", "used"), [((0, 0), 0), ((4, 0), 0), ((0, 4), 1), ((4, 4), 0)])
def test_of_two_records_with_other_tokens_that_of_the_latest_attempt_is_used_and_both_are_named(tmp_path, sinces, used):
    results, texts = tmp_path / "r.h5", ("first", "second")
    records = [
        make_request(0, num_tokens=2 + number, top=number, text=texts[number], since=since)
        for number, since in enumerate(sinces)
    ]
    first, second = (write_journal(journal_path(results, rank), [record]) for rank, record in enumerate(records))
    problems = merge(results, [first, second], num_requests=1, provenance=PROVENANCE)
    offset = second.read_bytes().index(encode(records[1])) - 16
    assert list(map(str, problems)) == [
        f"{second} holds a record at byte {offset} of request 0 with other tokens than in {first} at byte "
        f"{offset}, {'it' if used else 'the latter'} is used"
    ]
    (record,) = read(results)
    assert (record.text, len(record.tokens)) == (texts[used], 2 + used)


def test_many_requests_in_more_journals_than_are_open_at_a_time_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr("moempi.storage.journal_index.MAX_OPEN_JOURNALS", 2)
    results, records = tmp_path / "r.h5", [make_request(i) for i in range(5)]
    paths = [write_journal(journal_path(results, i), [records[i], *records[:i]]) for i in range(5)]
    assert merge(results, paths, num_requests=5, provenance=PROVENANCE) == []


@pytest.mark.parametrize("record", [REQUEST, ROUTING, make_rank(1)], ids=["request", "routing", "rank"])
def test_a_flipped_bit_with_the_right_checksum_ends_no_job(tmp_path, record):
    """It loses at most its own record; the next attempt computes it again."""
    whole, again = encode(record), write_journal(journal_path(tmp_path / "r.h5", 1), [REQUEST])
    for bit in random.Random(3).sample(range(8 * len(whole)), 30):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path, _ = journal_of(tmp_path / "r.h5", bytes(damaged))
        assert {0, 1} <= set(finished_requests([path], "run", NUM_REQUESTS)[0]["index"].tolist())
        merge_of(tmp_path / "r.h5", path, again)
        assert [record.id for record in read(tmp_path / "r.h5")][:2] == ["request-0", "request-1"]
