"""One request from its prompt to its record: chunked prefill, the rules that finish it, and its columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.requests import EOS, abacus_tokenizer, byte_tokenizer, make_prompt, make_request, make_sampled
from moempi.engine.request import Request
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import DataError

NO_TOKENIZER = TextTokenizer("", eos_tokens=(EOS,))


def generate(request, tokens, tokenizer=NO_TOKENIZER, **columns):
    """Compute the prompt at once, then accept one token a step while the request is unfinished."""
    for token in tokens:
        if request.finish is None:
            request.computed += request.num_waiting
            request.accept(make_sampled([token], **columns), tokenizer)
    return request


def generate_text(text, *, limit=100, **sampling):
    """Generate the characters of `text` one token at a time."""
    tokenizer = abacus_tokenizer()
    return generate(make_request([9], limit, **sampling), tokenizer.encode(text), tokenizer)


# The cache and the next tokens


@pytest.mark.parametrize(("length", "limit", "positions"), [(3, 5, 7), (3, 1, 3), (3, 0, 2), (1, 2, 2), (1, 0, 1)])
def test_the_last_token_needs_no_position(length, limit, positions):
    assert make_request(range(length), limit).capacity == positions


@given(prompt=st.lists(st.integers(0, 99), min_size=1, max_size=20), limit=st.integers(1, 6), data=st.data())
def test_chunked_prefill_computes_every_token_once_and_in_order(prompt, limit, data):
    request = make_request(prompt, limit)
    computed = []
    while request.finish is None:
        count = data.draw(st.integers(1, request.num_waiting))
        computed += request.all_tokens[request.computed : request.computed + count].tolist()
        request.computed += count
        if not request.num_waiting:
            request.accept(make_sampled([100 + len(request.tokens)]), NO_TOKENIZER)
    assert request.tokens == [100 + position for position in range(limit)]
    assert computed == prompt + request.tokens[:-1]
    assert request.computed == request.capacity == len(computed)


# Sampling


@pytest.mark.parametrize(
    ("seed", "name", "uniform"),
    [(0, "q0", 0.9212876323836169), (1, "q0", 0.7414798132080275), (0, "line-2", 0.425276612409732)],
)
def test_the_uniform_number_of_a_seed_an_id_and_a_position_never_changes(seed, name, uniform):
    assert make_request([5] * 3, 4, name=name, seed=seed).uniform(3) == uniform


@given(name=st.text(max_size=20), seed=st.integers(0, 2**63), length=st.integers(0, 50))
def test_the_uniform_number_is_below_one(name, seed, length):
    uniform = make_request([5], 4, name=name, seed=seed).uniform(length)
    assert 0.0 <= uniform < 1.0


def test_the_uniform_number_depends_on_no_slot_index_or_token():
    one, other = make_request([5, 6], 4, index=0), make_request([7, 8], 9, index=3)
    one.slot, one.computed, other.slot = 0, 1, 4
    assert one.uniform(2) == other.uniform(2) != one.uniform(3)


def test_a_repetition_penalty_sees_prompt_and_generated_tokens():
    request = generate(make_request([5, 6], 4, repetition_penalty=1.2), [7])
    assert request.logit_adjustment().seen.tolist() == [5, 6, 7]
    assert request.logit_adjustment().sampling.repetition_penalty == 1.2
    assert generate(make_request([5, 6], 4), [7]).logit_adjustment().seen.tolist() == []


# What finishes a generated text


def test_the_limit_finishes_with_the_text_of_all_tokens():
    request = generate_text("4213", limit=3)
    assert (request.finish, request.text, len(request.tokens)) == ("length", "421", 3)


def test_an_end_token_is_kept_but_has_no_text():
    tokenizer = abacus_tokenizer()
    request = generate(make_request([9], 10), [*tokenizer.encode("42"), EOS], tokenizer)
    assert (request.finish, request.text, request.tokens) == ("stop", "42", [*tokenizer.encode("42"), EOS])


def test_an_end_token_that_also_reaches_the_limit_is_a_stop():
    assert generate(make_request([9], 2), [5, EOS]).finish == "stop"


def test_any_of_several_end_tokens_stops():
    tokenizer = TextTokenizer("", eos_tokens=(3, 4))
    assert [generate(make_request([9], 9), [5, eos], tokenizer).finish for eos in (3, 4, 1)] == ["stop", "stop", None]


def test_ignore_eos_goes_on_to_the_limit():
    request = generate(make_request([9], 3, ignore_eos=True), [EOS, EOS, EOS, EOS])
    assert (request.finish, request.tokens) == ("length", [EOS] * 3)


def test_an_unfinished_request_has_no_finish():
    assert generate_text("42", limit=3).finish is None


@pytest.mark.parametrize(
    ("stop", "text", "num_tokens"),
    [
        (("3=",), "12+", 5),  # a stop string of two tokens
        (("+3",), "12", 4),
        (("=", "+"), "12", 3),
        (("1",), "", 1),  # at once: no text is left
        (("2+3", "+3"), "1", 4),  # both end at one token: the earlier one cuts
        (("+3", "2+3"), "1", 4),
    ],
)
def test_a_stop_string_across_tokens_cuts_the_text_and_keeps_the_tokens(stop, text, num_tokens):
    request = generate_text("12+3=15", stop=stop)
    assert (request.finish, request.text, len(request.tokens)) == ("stop", text, num_tokens)


def test_a_stop_string_in_the_prompt_or_never_complete_does_not_stop():
    request = generate_text("12+3", limit=4, stop=("3=", "9"))
    assert (request.finish, request.text) == ("length", "12+3")


def test_a_stop_string_that_the_last_token_completes_is_a_stop():
    request = generate_text("12+3=", limit=5, stop=("=",))
    assert (request.finish, request.text) == ("stop", "12+3")


def test_an_end_token_before_a_stop_string_stops_with_the_whole_text():
    tokenizer = abacus_tokenizer()
    request = generate(make_request([9], 10, stop=("=",)), [*tokenizer.encode("12"), EOS], tokenizer)
    assert (request.finish, request.text) == ("stop", "12")


def write(tokenizer, tokens, *, limit=100, **sampling):
    """Generate these tokens."""
    return generate(make_request([9], limit, **sampling), tokens, tokenizer)


@pytest.mark.parametrize(
    ("stop", "hidden", "shown"),
    [
        ("<|end|>", "ab", "a<s>b"),
        ("b<|end|>", "a", "a<s>"),
        ("<s>b", "a", "a"),
        ("<s>", "a", "a"),
        ("|end", "ab", "a<s>b<"),  # inside the text of a special token, of which no part is shown
        ("s>b<", "a", "a<"),
    ],
)
def test_a_stop_text_with_special_tokens_stops_and_ends_the_text(stop, hidden, shown):
    begin, end = 256, 257
    for writes_special, text in ((False, hidden), (True, shown)):
        tokenizer = byte_tokenizer("<s>", "<|end|>", writes_special=writes_special)
        tokens = [*tokenizer.encode("a"), begin, *tokenizer.encode("b"), end, *tokenizer.encode("c")]
        request = write(tokenizer, tokens, stop=("zz", stop))
        assert (request.finish, request.text) == ("stop", text)
        assert request.tokens == tokens[: 2 if stop == "<s>" else 3 if stop == "<s>b" else 4]


def test_a_special_token_between_two_letters_is_not_in_a_stop_text():
    tokenizer = byte_tokenizer("<s>")
    request = write(tokenizer, [*tokenizer.encode("a"), 256, *tokenizer.encode("b")], stop=("ab",), limit=3)
    assert (request.finish, request.text) == ("length", "ab")


def test_half_a_character_does_not_stop_and_a_written_replacement_character_does():
    tokenizer, half = byte_tokenizer("<s>"), "\ufffd"
    tokens = tokenizer.encode("日é\U0001f600.")
    request = write(tokenizer, tokens, stop=(half,), limit=len(tokens))
    assert (request.finish, request.text) == ("length", "日é\U0001f600.")
    request = write(tokenizer, tokenizer.encode(f"日{half}é"), stop=(half,))
    assert (request.finish, request.text, len(request.tokens)) == ("stop", "日", 6)


@given(pieces=st.lists(st.sampled_from([*"ab日é", "<s>", "<|end|>"]), min_size=1, max_size=8), data=st.data())
def test_a_generation_stops_at_the_first_token_with_which_the_text_has_a_stop_text(pieces, data):
    tokenizer = byte_tokenizer("<s>", "<|end|>", writes_special=True)
    whole, tokens = "".join(pieces), tokenizer.encode("".join(pieces))
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = whole[start : start + data.draw(st.integers(1, 6))]
    request = write(tokenizer, tokens, stop=(stop,))
    first = next(count for count in range(1, len(tokens) + 1) if stop in tokenizer.decode(tokens[:count]))
    assert (request.finish, request.tokens, request.text) == ("stop", tokens[:first], whole[: whole.index(stop)])
    hidden = write(byte_tokenizer("<s>", "<|end|>"), tokens, stop=(stop,))
    assert hidden.tokens == tokens[:first]
    assert whole.replace("<s>", "").replace("<|end|>", "").startswith(hidden.text)


@pytest.mark.parametrize("stop", ["c", "日é", "<|end|>c", "é<|end|>"])
def test_a_stop_text_is_found_far_from_the_beginning(stop):
    tokenizer = byte_tokenizer("<s>", "<|end|>", writes_special=True)
    start = "ab日<s>" * 200
    request = write(tokenizer, tokenizer.encode(f"{start}日é<|end|>c and more"), stop=("日日", stop), limit=9999)
    whole = f"{start}日é<|end|>c"
    assert (request.finish, request.text) == ("stop", whole[: whole.index(stop)])


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_stop_token_ends_the_text_before_it(ignore_eos):
    tokenizer = abacus_tokenizer()
    plus, two = tokenizer.encode("+2")
    request = write(tokenizer, tokenizer.encode("1+2"), stop_token_ids=(two, plus), ignore_eos=ignore_eos)
    assert (request.finish, request.text, request.tokens) == ("stop", "1", tokenizer.encode("1+"))
    assert write(NO_TOKENIZER, [5, 6, 7], stop_token_ids=(6,)).tokens == [5, 6]


def test_an_end_token_is_in_the_text_if_special_tokens_are_wanted():
    tokenizer = abacus_tokenizer(writes_special=True)
    assert write(tokenizer, [*tokenizer.encode("42"), EOS]).text == "42<eos>"


@pytest.mark.parametrize("logprob", [np.nan, np.inf, -np.inf])
def test_a_log_probability_that_is_not_finite_ends_the_request_as_an_error(logprob):
    request = generate(make_request([9], 10), [5, 6])
    request.computed += request.num_waiting
    request.accept(make_sampled([7], logprobs=[logprob]), NO_TOKENIZER)
    assert (request.finish, request.error) == ("error", "the model's logits are not numbers")
    record = request.to_record(task="generate")
    assert (record.tokens.tolist(), record.logprobs.tolist(), record.computed) == ([5, 6], [-5.0, -6.0], 3)


# Scores


def score(tokens, counts, *, top=0):
    """Score a prompt in chunks of `counts` tokens; token t has log-probability -t."""
    request = make_request(tokens, 0)
    for count in counts:
        targets = tokens[request.computed + 1 : request.computed + 1 + count]
        request.computed += count
        request.accept_scores(make_sampled(targets, top=top))
    return request


@pytest.mark.parametrize("counts", [(3,), (1, 2), (2, 1), (1, 1, 1)])
def test_scores_in_chunks_equal_scores_in_one_chunk_and_the_first_token_has_none(counts):
    record = score([11, 12, 13, 14], counts, top=2).to_record(task="score")
    np.testing.assert_array_equal(record.score, np.array([np.nan, -12, -13, -14], np.float32))
    assert record.score_top_tokens.tolist() == [[-1, -1], [12, 13], [13, 14], [14, 15]]
    expected = np.array([[np.nan, np.nan], [-12, -13], [-13, -14], [-14, -15]], np.float32)
    np.testing.assert_array_equal(record.score_top_logprobs, expected)
    assert (record.finish, record.computed, record.tokens.tolist(), record.text) == ("length", 3, [], "")
    assert record.logprobs.size == record.top_tokens.size == record.top_logprobs.size == 0


def test_a_scored_prompt_finishes_before_its_last_token_which_predicts_nothing():
    assert score([11, 12, 13], (1,)).finish is None
    assert score([11, 12, 13], (1, 1)).finish == "length"


def test_a_prompt_of_one_token_has_one_score_that_is_not_a_number():
    record = score([11], (1,)).to_record(task="score")
    assert record.finish == "length"
    np.testing.assert_array_equal(record.score, np.array([np.nan], np.float32))


def test_a_score_that_is_not_finite_ends_the_request_without_scores():
    request = make_request([11, 12, 13], 0)
    request.computed = 2
    request.accept_scores(make_sampled([12, 13], logprobs=[-1, np.nan]))
    record = request.to_record(task="score")
    assert (record.finish, record.error) == ("error", "the model's logits are not numbers")
    assert (record.score.size, record.computed, record.prompt.tolist()) == (0, 2, [11, 12, 13])


# Records


def test_a_generated_record_has_a_row_for_each_generated_token():
    prompt = make_prompt(tokens=[9, 8], index=6, name="line-7", reference="42", top_logprobs=2)
    record = generate(Request(prompt, np.array([9, 8], np.int32), 3), [5, 6, 7], top=2).to_record(task="generate")
    assert (record.index, record.id, record.reference) == (6, "line-7", "42")
    assert (record.finish, record.error, record.computed) == ("length", "", 4)
    assert (record.prompt.tolist(), record.tokens.tolist()) == ([9, 8], [5, 6, 7])
    assert record.logprobs.tolist() == [-5.0, -6.0, -7.0]
    assert record.top_tokens.tolist() == [[5, 6], [6, 7], [7, 8]]
    assert record.top_logprobs.tolist() == [[-5.0, -6.0], [-6.0, -7.0], [-7.0, -8.0]]
    assert record.score.size == 0


@pytest.mark.parametrize("task", ["generate", "score"])
def test_a_request_that_failed_before_its_first_step_has_empty_columns(task):
    request = make_request([], 0)
    request.fail("why not")
    record = request.to_record(task=task)
    assert (record.finish, record.error, record.computed) == ("error", "why not", 0)
    assert record.prompt.size == record.tokens.size == record.logprobs.size == record.score.size == 0


@pytest.mark.parametrize("stop", [(), ("x",)])
def test_tokens_that_cannot_be_decoded_end_the_request_with_an_error(stop, monkeypatch):
    def fail(tokens):
        raise DataError("the tokenizer cannot decode the tokens: a panic")

    tokenizer = abacus_tokenizer()
    monkeypatch.setattr(tokenizer, "decode", fail)
    request = make_request([1, 2], 1, stop=stop)
    request.accept(make_sampled([5]), tokenizer)
    assert (request.finish, request.error) == ("error", "the tokenizer cannot decode the tokens: a panic")
    assert request.to_record(task="generate").finish == "error"


def test_stop_tokens_and_end_tokens_are_not_sampled_before_the_least_number_of_tokens():
    request = make_request([5], 9, min_tokens=2, stop_token_ids=(7,))
    assert request.logit_adjustment((1,)).banned.tolist() == [1, 7]
    assert generate(request, [8, 9]).logit_adjustment((1,)).banned.tolist() == []
    assert make_request([5], 9, min_tokens=2, ignore_eos=True).logit_adjustment((1,)).banned.tolist() == []


def test_a_stop_text_is_not_looked_for_before_the_least_number_of_tokens():
    request = generate_text("4213", min_tokens=3, stop=("2",))
    assert (request.finish, request.text, len(request.tokens)) == ("stop", "4", 3)


def test_penalties_see_what_they_are_for():
    request = generate(make_request([5, 6], 9, presence_penalty=1.0), [7, 7])
    assert request.logit_adjustment().generated.tolist() == [7, 7]
    assert request.logit_adjustment().seen.tolist() == []
    assert generate(make_request([5, 6], 9), [7]).logit_adjustment().generated.tolist() == []
