"""Which rows of a step need logits, and how the sampled tokens return to their requests."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.requests import EOS, make_request, make_sampled
from moempi.backend.values import SampledTokens
from moempi.config.tensors import PAGE_ROWS
from moempi.engine.scheduler import Scheduler
from moempi.engine.sequences import Sequences
from moempi.engine.tasks import Generate, Score
from moempi.engine.tokenizer import TextTokenizer

TOP = 3
TOKENIZER = TextTokenizer("", eos_tokens=(EOS,))
SCORE = Score()


def generate():
    return Generate(TOKENIZER, top=TOP)


def next_token(request, count):
    """The token that the model of these tests gives to a request after `count` tokens."""
    return 1000 * (request.prompt.index + 1) + count


def take_steps(task, requests, sample, *, batch_tokens):
    """Schedule, sample and accept until every request is finished."""
    scheduler = Scheduler(requests, micro_batches=1, slots=range(4), batch_tokens=batch_tokens, pages=8)
    sequences = scheduler.sequences
    while scheduler.num_unfinished:
        work = scheduler.next_work(0)
        rows, logit_requests = task.logit_requests(sequences, work)
        assert len(rows) == len(logit_requests)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert all(0 <= row < work.lengths.sum() for row in rows.tolist())
        task.accept(sequences, work, sample(sequences, work, rows, logit_requests))
        scheduler.retire(0)


def step_of(*items):
    """The sequences of requests and the work of a step, for (request, rows); some may have computed positions."""
    sequences = Sequences(range(len(items)))
    for number, (request, _) in enumerate(items):
        computed = request.computed
        sequences.begin(number, request)
        sequences.computed[number] = computed
        if request.limit:
            sequences.known[number] += len(request.tokens)
    return sequences, next_work(sequences, *(rows for _, rows in items))


def next_work(sequences, *lengths):
    return sequences.work(np.arange(len(lengths)), np.array(lengths, np.int64))


# Generate


def test_only_a_sequence_whose_tokens_are_all_computed_gets_a_token():
    prompts = ([1, 2, 3], [4, 5, 6], [7])
    done, half, decoding = (make_request(prompt, 4, temperature=1.0) for prompt in prompts)
    decoding.computed, decoding.tokens = 1, [8]
    rows, logit_requests = generate().logit_requests(*step_of((done, 3), (half, 2), (decoding, 1)))
    assert rows.tolist() == [2, 5]  # the last rows of the first and the third sequence
    assert logit_requests["uniform"].tolist() == [done.uniform(3), decoding.uniform(2)]
    assert logit_requests["temperature"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("task", [generate(), SCORE])
def test_a_step_without_work_needs_no_logits(task):
    sequences, work = step_of()
    assert list(map(len, task.logit_requests(sequences, work))) == [0, 0]
    task.accept(sequences, work, make_sampled([], top=TOP))


def test_a_prompt_in_the_middle_of_its_prefill_accepts_no_token():
    half, done = make_request([4, 5, 6], 4), make_request([1, 2], 1)
    generate().accept(*step_of((half, 2), (done, 2)), make_sampled([50], top=TOP))
    assert (half.tokens, half.finish) == ([], None)
    assert (done.computed, done.tokens) == (2, [50])


def test_each_request_keeps_as_many_likeliest_tokens_as_it_names():
    requests = [make_request([1], 1, index=top, top_logprobs=top) for top in (0, 2, 3)]
    generate().accept(*step_of(*((request, 1) for request in requests)), make_sampled([50, 60, 70], top=TOP))
    records = [request.to_record(task="generate") for request in requests]
    assert [record.tokens.tolist() for record in records] == [[50], [60], [70]]
    assert [record.top_tokens.tolist() for record in records] == [[[]], [[60, 61]], [[70, 71, 72]]]


LENGTHS = st.lists(st.integers(1, 2 * PAGE_ROWS), min_size=1, max_size=6)


@given(lengths=LENGTHS, limit=st.integers(1, 4), batch_tokens=st.integers(1, 150))
def test_generated_tokens_return_to_their_requests_whatever_the_batches(lengths, limit, batch_tokens):
    requests = [make_request([5] * length, limit, index=index) for index, length in enumerate(lengths)]

    def sample(sequences, work, rows, logit_requests):
        owners = np.repeat(work.numbers, work.lengths)[rows].tolist()
        counts = [sequences.known[owner] - lengths[sequences.request(owner).prompt.index] for owner in owners]
        return make_sampled(list(map(next_token, map(sequences.request, owners), counts)), top=TOP)

    take_steps(generate(), requests, sample, batch_tokens=batch_tokens)
    for index, request in enumerate(requests):
        assert request.tokens == [1000 * (index + 1) + position for position in range(limit)]
        assert request.finish == "length"


# Score


def test_every_row_with_a_next_token_in_its_prompt_is_scored():
    whole, half, tail = make_request([1, 2, 3], 0), make_request([4, 5, 6], 0), make_request([7, 8, 9], 0)
    tail.computed = 1
    rows, targets = SCORE.logit_requests(*step_of((whole, 2), (half, 1), (tail, 1)))
    assert (rows.tolist(), targets.tolist()) == ([0, 1, 2, 3], [2, 3, 5, 9])


def test_a_prompt_of_one_token_is_computed_without_logits():
    request, other = make_request([7], 0), make_request([8, 9], 0)
    step = step_of((request, 1), (other, 1))
    assert [values.tolist() for values in SCORE.logit_requests(*step)] == [[1], [9]]
    SCORE.accept(*step, make_sampled([9]))
    assert [request.finish, other.finish] == ["length", "length"]
    assert request.to_record(task="score").score.shape == (1,)


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 150))
def test_every_score_belongs_to_its_token_whatever_the_batches(lengths, batch_tokens):
    prompts = [[1000 * index + position for position in range(length)] for index, length in enumerate(lengths)]
    requests = [make_request(tokens, 0, index=index) for index, tokens in enumerate(prompts)]
    take_steps(SCORE, requests, lambda _, work, rows, targets: make_sampled(targets), batch_tokens=batch_tokens)
    for request in requests:
        record = request.to_record(task="score")
        assert record.finish == "length"
        assert np.isnan(record.score[0])
        np.testing.assert_array_equal(record.score[1:], -request.prompt_tokens[1:].astype(np.float32))
        assert record.score_top_tokens.size == 0


@pytest.mark.parametrize("task", [generate(), SCORE])
def test_logits_that_are_not_numbers_end_one_request_of_a_step_alone(task):
    tokens = [11, 12]
    broken, sound = make_request(tokens, 3, index=0), make_request(tokens, 3, index=1)
    sampled = make_sampled([12, 12], top=TOP)
    sampled = SampledTokens(
        sampled.tokens, np.array([np.nan, -12], np.float32), sampled.top_tokens, sampled.top_logprobs
    )
    rows = 1 if task is SCORE else 2
    sampled = sampled.take(slice(2))
    task.accept(*step_of((broken, rows), (sound, rows)), sampled)
    assert (broken.finish, broken.error) == ("error", "the model's logits are not numbers")
    assert sound.finish != "error"


def test_a_scored_prompt_that_fails_in_a_later_chunk_is_an_error_record_without_scores():
    request = make_request([11, 12, 13, 14], 0)
    sequences, work = step_of((request, 2))
    SCORE.accept(sequences, work, make_sampled([12, 13]))
    assert request.finish is None
    SCORE.accept(sequences, next_work(sequences, 1), make_sampled([14], logprobs=[np.nan]))
    record = request.to_record(task="score")
    assert (record.finish, record.error) == ("error", "the model's logits are not numbers")
    assert (record.score.size, record.score_top_tokens.size, record.score_top_logprobs.size) == (0, 0, 0)
    assert (record.computed, record.prompt.tolist()) == (3, [11, 12, 13, 14])
