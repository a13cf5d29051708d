"""Which rows of a step need logits, and how the sampled tokens return to their requests."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.requests import EOS, make_request, make_sampled
from moempi.backend.protocol import SampledTokens
from moempi.config.tensors import PAGE_ROWS
from moempi.engine.scheduler import Scheduler
from moempi.engine.tasks import Generate, Score
from moempi.engine.tokenizer import TextTokenizer

TOP = 3
TOKENIZER = TextTokenizer("", eos_tokens=(EOS,))
GENERATE, SCORE = Generate(TOKENIZER, top=TOP), Score(top=TOP)


def next_token(request):
    """The token that the model of these tests gives to a request."""
    return 1000 * (request.prompt.index + 1) + len(request.tokens)


def take_steps(task, requests, sample, *, batch_tokens):
    """Schedule, sample and accept until every request is finished."""
    scheduler = Scheduler(requests, micro_batches=1, slots=range(4), batch_tokens=batch_tokens, pages=8)
    while scheduler.num_unfinished:
        work = scheduler.next_work(0)
        rows, logit_requests = task.logit_requests(work)
        assert len(rows) == len(logit_requests)
        assert rows == sorted(set(rows))
        assert all(0 <= row < sum(count for _, count in work) for row in rows)
        task.accept(work, sample(work, rows, logit_requests))
        scheduler.retire(0)


# Generate


def test_only_a_sequence_whose_tokens_are_all_computed_gets_a_token():
    done, half, decoding = make_request([1, 2, 3], 4), make_request([4, 5, 6], 4), make_request([7], 4)
    decoding.computed, decoding.tokens = 1, [8]
    rows, logit_requests = GENERATE.logit_requests([(done, 3), (half, 2), (decoding, 1)])
    assert rows == [2, 5]  # the last rows of the first and the third sequence
    assert [request.uniform for request in logit_requests] == [
        done.sampling_request().uniform,
        decoding.sampling_request().uniform,
    ]


@pytest.mark.parametrize("task", [GENERATE, SCORE])
def test_a_step_without_work_needs_no_logits(task):
    assert task.logit_requests([]) == ([], [])
    task.accept([], make_sampled([], top=TOP))


def test_a_prompt_in_the_middle_of_its_prefill_accepts_no_token():
    half, done = make_request([4, 5, 6], 4), make_request([1, 2], 4)
    GENERATE.accept([(half, 2), (done, 2)], make_sampled([50], top=TOP))
    assert (half.computed, half.tokens, half.finish) == (2, [], None)
    assert (done.computed, done.tokens) == (2, [50])


def test_each_request_keeps_as_many_likeliest_tokens_as_it_names():
    requests = [make_request([1], 1, index=top, top_logprobs=top) for top in (0, 2, 3)]
    GENERATE.accept([(request, 1) for request in requests], make_sampled([50, 60, 70], top=TOP))
    records = [request.to_record(task="generate") for request in requests]
    assert [record.tokens.tolist() for record in records] == [[50], [60], [70]]
    assert [record.top_tokens.tolist() for record in records] == [[[]], [[60, 61]], [[70, 71, 72]]]


LENGTHS = st.lists(st.integers(1, 2 * PAGE_ROWS), min_size=1, max_size=6)


@settings(deadline=None)
@given(lengths=LENGTHS, limit=st.integers(1, 4), batch_tokens=st.integers(1, 150))
def test_generated_tokens_return_to_their_requests_whatever_the_batches(lengths, limit, batch_tokens):
    requests = [make_request([5] * length, limit, index=index) for index, length in enumerate(lengths)]

    def sample(work, rows, logit_requests):
        owners = np.repeat(np.arange(len(work)), [count for _, count in work])[rows]
        return make_sampled([next_token(work[owner][0]) for owner in owners], top=TOP)

    take_steps(GENERATE, requests, sample, batch_tokens=batch_tokens)
    for index, request in enumerate(requests):
        assert request.tokens == [1000 * (index + 1) + position for position in range(limit)]
        assert request.finish == "length"


# Score


def test_every_row_with_a_next_token_in_its_prompt_is_scored():
    whole, half, tail = make_request([1, 2, 3], 0), make_request([4, 5, 6], 0), make_request([7, 8, 9], 0)
    tail.computed = 1
    assert SCORE.logit_requests([(whole, 2), (half, 1), (tail, 1)]) == ([0, 1, 2, 3], [2, 3, 5, 9])


def test_a_prompt_of_one_token_is_computed_without_logits():
    request, other = make_request([7], 0), make_request([8, 9], 0)
    work = [(request, 1), (other, 1)]
    assert SCORE.logit_requests(work) == ([1], [9])
    SCORE.accept(work, make_sampled([9]))
    assert [request.finish, other.finish] == ["length", "length"]
    assert request.to_record(task="score").score.shape == (1,)


@settings(deadline=None)
@given(lengths=LENGTHS, batch_tokens=st.integers(1, 150))
def test_every_score_belongs_to_its_token_whatever_the_batches(lengths, batch_tokens):
    prompts = [[1000 * index + position for position in range(length)] for index, length in enumerate(lengths)]
    requests = [make_request(tokens, 0, index=index) for index, tokens in enumerate(prompts)]
    take_steps(SCORE, requests, lambda work, rows, targets: make_sampled(targets, top=TOP), batch_tokens=batch_tokens)
    for request in requests:
        record = request.to_record(task="score")
        assert record.finish == "length"
        assert np.isnan(record.score[0])
        np.testing.assert_array_equal(record.score[1:], -request.prompt_tokens[1:].astype(np.float32))
        np.testing.assert_array_equal(record.score_top_tokens[1:, 0], request.prompt_tokens[1:])


@pytest.mark.parametrize("task", [GENERATE, SCORE])
def test_logits_that_are_not_numbers_end_one_request_of_a_step_alone(task):
    tokens = [11, 12]
    broken, sound = make_request(tokens, 3, index=0), make_request(tokens, 3, index=1)
    sampled = make_sampled([12, 12], top=TOP)
    sampled = SampledTokens(
        sampled.tokens, np.array([np.nan, -12], np.float32), sampled.top_tokens, sampled.top_logprobs
    )
    task.accept([(broken, 2), (sound, 2)], sampled)
    assert (broken.finish, broken.error) == ("error", "the model's logits are not numbers")
    assert sound.finish != "error"


def test_a_scored_prompt_that_fails_in_a_later_chunk_is_an_error_record_without_scores():
    request = make_request([11, 12, 13, 14], 0)
    SCORE.accept([(request, 2)], make_sampled([12, 13]))
    assert request.finish is None
    SCORE.accept([(request, 1)], make_sampled([14], logprobs=[np.nan]))
    record = request.to_record(task="score")
    assert (record.finish, record.error) == ("error", "the model's logits are not numbers")
    assert (record.score.size, record.score_top_tokens.size, record.score_top_logprobs.size) == (0, 0, 0)
    assert (record.computed, record.prompt.tolist()) == (3, [11, 12, 13, 14])
