"""The recorder: what it writes into a real journal, and what it counts."""

from collections import Counter

import numpy as np
import pytest

from engine.requests import make_prompt, make_request, make_sampled
from moempi.engine.earlier import Earlier
from moempi.engine.recorder import Recorder
from moempi.engine.request import Request
from moempi.engine.sequences import Sequences
from moempi.errors import StorageError
from moempi.observe.progress import Counts
from moempi.storage.journal import JournalReader, JournalWriter
from moempi.storage.records import RankRecord


@pytest.fixture
def journal(tmp_path):
    with JournalWriter(tmp_path / "rank.part", fingerprint="run") as writer:
        yield writer


def recorder_of(journal, *, task="generate", writes_records=True, on_progress=lambda counts: None):
    return Recorder(journal, task=task, writes_records=writes_records, on_progress=on_progress)


def recorded(journal):
    with JournalReader(journal.path) as reader:
        return [record for _, record in reader.records()]


def finished(index, tokens=(5, 6), *, finish="length", text="", reference=None):
    request = Request(make_prompt(tokens=[9, 8, 7], index=index, reference=reference), np.array([9, 8, 7], np.int32), 4)
    request.tokens, request.sampled = list(tokens), [make_sampled(tokens)]
    request.finish, request.text = finish, text
    return request


def scored(index):
    request = Request(make_prompt(tokens=[9, 8, 7], index=index), np.array([9, 8, 7], np.int32), 0)
    request.computed, request.sampled, request.finish = 3, [make_sampled([8, 7])], "length"
    return request


def counters(recorder):
    return recorder.steps, recorder.tokens, dict(recorder.finishes), recorder.referenced, recorder.exact


def test_a_new_recorder_has_counted_nothing(journal):
    recorder = recorder_of(journal)
    assert counters(recorder) == (0, 0, {}, 0, 0)
    assert recorder.counts()[:2] == (0, 0)
    assert recorder.disk_s == 0.0


def test_finished_requests_are_in_the_journal_at_once_and_in_order(journal):
    recorder = recorder_of(journal)
    recorder.end_step([finished(4), finished(2)])
    assert [record.index for record in recorded(journal)] == [4, 2]
    recorder.end_step([])
    recorder.end_step([finished(9, [5])])
    assert [(record.index, record.tokens.tolist()) for record in recorded(journal)] == [
        (4, [5, 6]),
        (2, [5, 6]),
        (9, [5]),
    ]
    assert counters(recorder) == (3, 5, {"length": 3}, 0, 0)
    assert recorder.counts()[:2] == (3, 5)
    assert recorder.disk_s > 0.0


def test_records_outside_a_step_count_no_step(journal):
    recorder = recorder_of(journal)
    recorder.record([finished(0)])
    assert counters(recorder) == (0, 2, {"length": 1}, 0, 0)


def test_every_token_of_a_scored_prompt_counts(journal):
    recorder = recorder_of(journal, task="score")
    recorder.end_step([scored(0), scored(1)])
    assert recorder.counts()[:2] == (2, 6)
    assert [len(record.score) for record in recorded(journal)] == [3, 3]


def test_rows_of_prompts_and_generated_tokens_count_before_their_request_is_finished(journal):
    recorder = recorder_of(journal)
    sequences = Sequences(range(2))
    sequences.begin(0, make_request(range(10), 3, index=0))
    sequences.begin(1, make_request([1, 2], 3, index=1))
    recorder.end_step([], sequences.work(np.array([0, 1]), np.array([6, 2])))
    assert recorder.counts(running=2) == Counts(running=2, prompt_tokens=8, generated=1)
    sequences.computed[:], sequences.known[1] = [6, 2], 3
    recorder.end_step([], sequences.work(np.array([0, 1]), np.array([4, 1])))
    assert recorder.counts(running=2) == Counts(running=2, prompt_tokens=12, generated=3)


def test_a_scored_prompt_generates_no_token(journal):
    recorder = recorder_of(journal, task="score")
    sequences = Sequences(range(1))
    sequences.begin(0, scored(0))
    recorder.end_step([scored(0)], sequences.work(np.array([0]), np.array([2])))
    assert recorder.counts() == Counts(finished=1, tokens=3, prompt_tokens=2)


def test_finishes_are_counted_by_kind(journal):
    recorder = recorder_of(journal)
    recorder.record([finished(0), finished(1, finish="stop"), finished(2, [], finish="error"), finished(3)])
    assert recorder.finishes == {"length": 2, "stop": 1, "error": 1}
    assert recorder.counts() == Counts(finished=4, tokens=6, errors=1)


def test_a_request_is_exact_if_its_text_equals_the_reference(journal):
    recorder = recorder_of(journal)
    texts = [("42", "42"), ("42", "43"), ("42 ", "42"), ("", "42"), ("42", None), ("", "")]
    recorder.record(finished(index, text=text, reference=reference) for index, (text, reference) in enumerate(texts))
    assert (recorder.referenced, recorder.exact) == (5, 2)


def test_a_rank_that_writes_no_records_counts_its_steps_alone(journal):
    recorder = recorder_of(journal, writes_records=False)
    recorder.end_step([finished(0, reference="42")])
    assert recorded(journal) == []
    assert counters(recorder) == (1, 0, {}, 0, 0)


def test_a_muted_recorder_writes_nothing_shows_nothing_and_leaves_the_counts_alone(journal):
    shown = []
    recorder = recorder_of(journal, on_progress=shown.append)
    muted = recorder.muted()
    muted.end_step([finished(0)])
    muted.on_progress(Counts(1, 2))
    assert (recorded(journal), shown) == ([], [])
    assert counters(muted) == (1, 0, {}, 0, 0)
    assert counters(recorder) == (0, 0, {}, 0, 0)
    recorder.on_progress(Counts(3, 4))
    assert shown == [Counts(3, 4)]


def test_requests_of_earlier_attempts_are_added_without_their_tokens(journal):
    recorder = recorder_of(journal)
    recorder.record([finished(9, reference="42", text="42")])
    earlier = Earlier(
        indices=np.array([1, 2, 3]), finishes=Counter(stop=2, length=1), tokens=70, referenced=3, exact=2, next_step=5
    )
    recorder.add_earlier(earlier)
    assert counters(recorder) == (0, 2, {"length": 2, "stop": 2}, 4, 3)
    assert recorder.counts()[:2] == (4, 2)
    assert earlier.finishes == {"stop": 2, "length": 1}


def test_any_record_can_be_appended_and_counts_as_no_request(journal):
    recorder = recorder_of(journal, writes_records=False)
    recorder.append(RankRecord(rank=3, host="n", expert_load=np.zeros((1, 2), np.int64), seconds={}, steps=1, tokens=2))
    assert [record.rank for record in recorded(journal)] == [3]
    assert recorder.counts()[:2] == (0, 0)


def test_a_record_that_the_disk_does_not_take_is_a_storage_error_and_not_counted(journal):
    recorder = recorder_of(journal)
    recorder.record([finished(0)])
    journal.close()
    with pytest.raises(StorageError, match=r"rank\.part: cannot be written"):
        recorder.end_step([finished(1), finished(2)])
    assert counters(recorder) == (1, 2, {"length": 1}, 0, 0)
    assert [record.index for record in recorded(journal)] == [0]
