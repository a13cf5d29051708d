"""What a new attempt learns from the journals of earlier ones."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moempi.engine.earlier import NOTHING_EARLIER, Earlier, finished_requests, with_traces
from moempi.engine.traced_rows import TracedRows
from moempi.errors import StorageError
from moempi.storage.journal import JournalReader, JournalWriter, journal_path
from moempi.storage.records import RankRecord, RequestRecord, TraceRecord

NUM_REQUESTS = 10
RANK = RankRecord(rank=0, host="n", expert_load=np.zeros((1, 2), np.int64), seconds={}, steps=1, tokens=2)


def request(index, *, tokens=0, scores=0, finish="length", text="", reference=None):
    return RequestRecord(
        index=index,
        id=f"q{index}",
        finish=finish,
        text=text,
        reference=reference,
        prompt=np.zeros(scores, np.int32),
        score=np.zeros(scores, np.float32),
        tokens=np.zeros(tokens, np.int32),
        logprobs=np.zeros(tokens, np.float32),
    )


def routing(step, *, since=0):
    return TraceRecord(
        table="routing",
        since=since,
        step=step,
        rank=0,
        layers=(1,),
        requests=np.zeros(2, np.int64),
        positions=np.arange(2, dtype=np.int32),
        columns={"experts": np.zeros((1, 2, 3), np.int32)},
    )


def write_journal(path, *records, fingerprint="run"):
    with JournalWriter(path, fingerprint=fingerprint) as writer:
        for record in records:
            writer.append(record)
    return path


def earlier_of(*journals):
    done, next_step, _ = finished_requests(journals, "run", NUM_REQUESTS)
    return Earlier.from_finished(done, next_step=next_step)


# The scan


def test_no_journal_and_an_empty_journal_have_finished_nothing(tmp_path):
    for earlier in (NOTHING_EARLIER, earlier_of(), earlier_of(write_journal(tmp_path / "0"))):
        assert (earlier.indices.tolist(), earlier.finishes, earlier.tokens) == ([], {}, 0)
        assert (earlier.referenced, earlier.exact, earlier.next_step) == (0, 0, 0)


def test_finished_requests_of_all_journals_are_counted(tmp_path):
    first = write_journal(
        tmp_path / "0",
        request(4, tokens=3, finish="stop", text="42", reference="42"),
        RANK,
        request(1, tokens=5, text="41", reference="42"),
    )
    second = write_journal(tmp_path / "1", request(0, finish="error", reference="42"), request(7, scores=6, text="42"))
    earlier = earlier_of(first, second)
    assert earlier.indices.tolist() == [0, 1, 4, 7]
    assert earlier.finishes == {"stop": 1, "length": 2, "error": 1}
    assert (earlier.tokens, earlier.referenced, earlier.exact) == (14, 3, 1)
    assert earlier.next_step == 1


def test_a_request_that_several_attempts_finished_counts_once(tmp_path):
    same = request(4, tokens=3, finish="stop", text="42", reference="42")
    earlier = earlier_of(write_journal(tmp_path / "0", same, same), write_journal(tmp_path / "1", same))
    assert (earlier.indices.tolist(), earlier.finishes) == ([4], {"stop": 1})
    assert (earlier.tokens, earlier.referenced, earlier.exact) == (3, 1, 1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=25))
def test_no_division_among_journals_changes_what_is_finished(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("parts")
    kinds = ("stop", "length", "error")
    paths = [
        write_journal(
            folder / str(rank),
            *(request(index, tokens=index, finish=kinds[index % 3]) for index, owner in written if owner == rank),
        )
        for rank in range(3)
    ]
    indices = {index for index, _ in written}
    for order in (paths, paths[::-1]):
        earlier = earlier_of(*order)
        assert earlier.indices.tolist() == sorted(indices)
        assert earlier.tokens == sum(indices)
        assert earlier.finishes.total() == len(indices)
        assert all(earlier.finishes[kind] == sum(index % 3 == k for index in indices) for k, kind in enumerate(kinds))


@pytest.mark.parametrize(("steps", "next_step"), [([0], 1), ([3, 9, 4], 10), ([], 1)])
def test_the_next_step_follows_all_recorded_ones(tmp_path, steps, next_step):
    first = write_journal(tmp_path / "0", *(routing(step) for step in steps))
    second = write_journal(tmp_path / "1", request(0))
    assert finished_requests([first, second], "run", NUM_REQUESTS)[1] == next_step
    assert finished_requests([second, first], "run", NUM_REQUESTS)[1] == next_step


def test_a_torn_record_at_the_end_is_passed_over(tmp_path):
    path = write_journal(tmp_path / "0", request(1, tokens=2), request(2, tokens=3))
    path.write_bytes(path.read_bytes()[:-1])
    assert earlier_of(path).indices.tolist() == [1]
    assert finished_requests([path], "run", NUM_REQUESTS)[2][0].sentence.startswith(f"{path} ends with")


def test_requests_behind_damage_are_finished_and_the_damage_is_reported(tmp_path):
    path = write_journal(tmp_path / "0", request(1, tokens=2), request(2, tokens=3), request(3, tokens=1))
    with JournalReader(path) as journal:
        offset = [offset for offset, _ in journal.records()][1]
    octets = bytearray(path.read_bytes())
    octets[offset + 30] ^= 1
    path.write_bytes(octets)
    assert earlier_of(path).indices.tolist() == [1, 3]
    sound = write_journal(tmp_path / "1", request(7))
    problems = finished_requests([path, sound], "run", NUM_REQUESTS)[2]
    assert list(map(str, problems)) == [f"{path} is damaged at byte {offset}, the records behind it are kept"]


@pytest.mark.parametrize("position", [0, 1])
def test_a_journal_of_another_run_is_refused_with_its_path(tmp_path, position):
    own = write_journal(journal_path(tmp_path / "r.h5", 0), request(0))
    other = write_journal(journal_path(tmp_path / "r.h5", 1), fingerprint="another")
    journals = [own]
    journals.insert(position, other)
    with pytest.raises(StorageError) as error:
        finished_requests(journals, "run", NUM_REQUESTS)
    assert str(error.value) == (
        f"{other}: belongs to an unfinished run with other weights, prompts or settings; finish that run, "
        f"remove {tmp_path / 'r.h5'}.parts to give it up, or choose another output.results"
    )


def test_a_file_that_is_no_journal_or_is_missing_is_a_storage_error(tmp_path):
    (tmp_path / "0").write_bytes(b"something else")
    for path in (tmp_path / "0", tmp_path / "1"):
        with pytest.raises(StorageError, match=str(path)):
            finished_requests([path], "run", NUM_REQUESTS)


# Recorded routing


def routing_of(rows, *, since=0, step=0, layers=(1, 3)):
    """The routing of (request, position) pairs."""
    requests, positions = (np.array(column) for column in zip(*rows, strict=True))
    return TraceRecord(
        table="routing",
        since=since,
        step=step,
        rank=0,
        layers=layers,
        requests=requests.astype(np.int64),
        positions=positions.astype(np.int32),
        columns={"experts": np.zeros((len(layers), len(rows), 2), np.uint8)},
    )


def routed_requests(*of_ranks, num_layers=2):
    """The requests of a scan by ranks, each of which reads the records of one journal, that need no computing again."""
    counts, finished = [], []
    for path in of_ranks:
        counts.append(TracedRows(NUM_REQUESTS, ["routing"]))
        finished.append(finished_requests([path], "run", NUM_REQUESTS, traced=counts[-1])[0])
    since = np.max([count.since for count in counts], axis=0)
    for count in counts:
        reduced = {id(count.since): since}
        count.reduce(lambda array, _, reduced=reduced: reduced.get(id(array), array))
    num_rows = np.sum([count.num_rows for count in counts], axis=0)
    kept, num_lost = with_traces(np.concatenate(finished), num_rows, {"routing": ("computed", num_layers)})
    assert num_lost == len(np.unique(np.concatenate(finished)["index"])) - len(kept)
    return kept["index"].tolist()


def finished_request(index, *, computed, since=0):
    return RequestRecord(
        index=index, id="q", finish="stop", computed=computed, since=since, prompt=np.zeros(computed, np.int32)
    )


def test_a_finished_request_is_kept_if_all_its_rows_are_recorded_in_all_layers(tmp_path):
    done = [finished_request(index, computed=index) for index in range(4)]
    stages = [
        routing_of([(1, 0), (2, 0), (2, 1), (3, 0)], layers=(1,)),
        routing_of([(3, 1), (3, 2)], step=1, layers=(1,)),
        routing_of([(1, 0), (3, 0), (2, 1)], layers=(3,)),
        routing_of([(3, 1), (3, 2)], step=1, layers=(3,)),
    ]
    assert routed_requests(write_journal(tmp_path / "0", *done, *stages)) == [0, 1, 3]
    assert routed_requests(write_journal(tmp_path / "1", *done, *stages[:3])) == [0, 1]
    assert routed_requests(write_journal(tmp_path / "2", *done, *stages[:2])) == [0]
    parts = (
        write_journal(tmp_path / "3", *stages[::2], *done[:2]),
        write_journal(tmp_path / "4", *stages[1::2], *done[2:]),
    )
    assert routed_requests(*parts) == routed_requests(*parts[::-1]) == [0, 1, 3]


def test_rows_of_an_attempt_that_did_not_finish_a_request_count_no_more(tmp_path):
    """Whether the interrupted attempt is the earlier one or the later one, and whatever rank reads its rows."""
    two = [(0, 0), (0, 1)]
    interrupted, again = routing_of(two[:1]), routing_of(two, since=5, step=5)
    for number, (records, kept) in enumerate(
        [
            ([interrupted, again, finished_request(0, computed=2, since=5)], [0]),
            ([again, finished_request(0, computed=2, since=5), interrupted], [0]),
            ([interrupted, routing_of(two[:1], since=5, step=5), finished_request(0, computed=2, since=5)], []),
            ([finished_request(0, computed=1), interrupted, finished_request(0, computed=2, since=5), again], [0]),
            ([finished_request(0, computed=1), finished_request(0, computed=2, since=5), interrupted], []),
        ]
    ):
        assert routed_requests(write_journal(tmp_path / f"{number}", *records)) == kept, number
        parts = [write_journal(tmp_path / f"{number}-{i}", record) for i, record in enumerate(records)]
        assert routed_requests(*parts) == kept, number


def test_the_latest_attempt_at_a_request_counts(tmp_path):
    first, second = request(0, tokens=3, finish="length"), msgspec.structs.replace(request(0, tokens=5), since=2)
    for journals in ([first, second], [second, first]):
        paths = [write_journal(tmp_path / f"{record.since}-{len(journals)}", record) for record in journals]
        assert earlier_of(*paths).tokens == 5
        assert earlier_of(*paths).next_step == 3
