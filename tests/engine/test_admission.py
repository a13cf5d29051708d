"""Prompts become requests, or finished errors that say what is wrong."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.requests import EOS, abacus_tokenizer, make_prompt
from moempi.engine import admission
from moempi.engine.chat import ChatText
from moempi.engine.tokenizer import TextTokenizer
from storage.models import SMALL

POSITIONS = 8
ARCHITECTURE = msgspec.structs.replace(SMALL, vocab_size=98, max_positions=POSITIONS)
NO_TOKENIZER = TextTokenizer("", eos_tokens=(EOS,))


def admit(prompt, *, task="generate", tokenizer=NO_TOKENIZER):
    request = admission.make_request(prompt, tokenizer, ARCHITECTURE, task=task)
    assert request.prompt is prompt
    return request


def test_text_is_encoded_and_given_tokens_are_taken_as_they_are():
    tokenizer = abacus_tokenizer()
    for prompt, tokens in (
        (make_prompt("12+3="), tokenizer.encode("12+3=")),
        (make_prompt(tokens=[5, EOS, 97]), [5, EOS, 97]),
    ):
        admitted = admit(prompt, tokenizer=tokenizer).prompt_tokens
        assert (admitted.tolist(), admitted.dtype) == (tokens, np.int32)


def test_a_prompt_with_an_error_is_a_request_with_it():
    request = admit(make_prompt(error="p.jsonl: line 2: not a prompt"))
    assert (request.finish, request.error) == ("error", "p.jsonl: line 2: not a prompt")
    assert len(request.prompt_tokens) == 0


def test_text_without_a_tokenizer_is_an_error():
    request = admit(make_prompt("12"))
    assert (request.finish, len(request.prompt_tokens)) == ("error", 0)
    assert request.error == "the weight file holds no tokenizer; give the prompt as tokens"


@pytest.mark.parametrize("task", ["generate", "score"])
def test_a_prompt_without_tokens_is_an_error(task):
    request = admit(make_prompt(""), tokenizer=abacus_tokenizer(), task=task)
    assert (request.finish, request.error) == ("error", "the prompt has no tokens")


def test_a_chat_has_the_tokens_of_its_text_without_a_begin_token_or_its_error():
    tokenizer = abacus_tokenizer()
    first, second = (
        admission.make_request(make_prompt(), tokenizer, ARCHITECTURE, task="generate", chat=chat)
        for chat in (ChatText("1<eos>2"), ChatText(error="no template"))
    )
    assert first.prompt_tokens.tolist() == [*tokenizer.encode("1"), EOS, *tokenizer.encode("2")]
    assert (second.finish, second.error) == ("error", "no template")


@pytest.mark.parametrize(("token", "finish"), [(97, None), (98, "error"), (2**63 - 1, "error")])
def test_a_stop_token_beyond_the_vocabulary_is_an_error(token, finish):
    request = admit(make_prompt(tokens=[5], stop_token_ids=(3, token)))
    assert request.finish == finish
    assert request.error == (f"stop_token_ids: token {token} is beyond the model's vocabulary of 98" if finish else "")


@pytest.mark.parametrize(("token", "error"), [(97, ""), (98, "token 98 is beyond the model's vocabulary of 98")])
def test_a_token_beyond_the_vocabulary_is_an_error(token, error):
    request = admit(make_prompt(tokens=[5, token, 6]))
    assert (request.finish, request.error) == ("error" if error else None, error)


TOO_LONG = "the prompt has {} tokens, the model has 8 positions"


@pytest.mark.parametrize(
    ("task", "length", "error"),
    [
        ("generate", POSITIONS - 1, ""),
        ("generate", POSITIONS, TOO_LONG.format(8)),
        ("score", POSITIONS + 1, ""),
        ("score", POSITIONS + 2, TOO_LONG.format(10)),
    ],
)
def test_a_generated_token_needs_a_position_and_the_last_token_of_a_scored_prompt_none(task, length, error):
    request = admit(make_prompt(tokens=[5] * length), task=task)
    assert (request.finish, request.error) == ("error" if error else None, error)


@given(length=st.integers(1, POSITIONS - 1), max_tokens=st.integers(1, 20))
def test_max_tokens_is_cut_to_the_positions_that_the_prompt_leaves(length, max_tokens):
    request = admit(make_prompt(tokens=[5] * length, max_tokens=max_tokens))
    assert request.finish is None
    assert request.limit == min(max_tokens, POSITIONS - length)


def test_a_scored_prompt_generates_nothing():
    assert admit(make_prompt(tokens=[5, 6], max_tokens=4), task="score").limit == 0
