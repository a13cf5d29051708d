"""Text to tokens and back with a real tokenizer, and without one."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.requests import EOS, abacus_tokenizer
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import DataError
from mpirun import ROOT

TOKENIZER = json.loads((ROOT / "weights/abacus/tokenizer.json").read_text(encoding="utf-8"))
CHARACTERS = [token for token in TOKENIZER["model"]["vocab"] if len(token) == 1]


@settings(deadline=None)
@given(st.text(st.sampled_from(CHARACTERS), max_size=30))
def test_text_of_the_vocabulary_survives_encoding_and_decoding(text):
    tokenizer = abacus_tokenizer()
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text)
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("special", [token["content"] for token in TOKENIZER["added_tokens"]])
def test_a_special_token_spelled_out_in_a_prompt_is_plain_text(special):
    tokenizer = abacus_tokenizer()
    tokens = tokenizer.encode(f"1{special}2")
    assert not {token["id"] for token in TOKENIZER["added_tokens"]} & set(tokens)
    assert tokenizer.decode(tokens) == f"1{special}2"


def test_decoding_leaves_special_tokens_out():
    tokenizer = abacus_tokenizer()
    assert tokenizer.decode([EOS, *tokenizer.encode("7+"), 0, *tokenizer.encode("5"), EOS]) == "7+5"


def test_a_character_beyond_the_vocabulary_becomes_the_unknown_token():
    assert abacus_tokenizer().encode("1é") == [*abacus_tokenizer().encode("1"), TOKENIZER["model"]["vocab"]["<unk>"]]


def test_a_tokenizer_whose_template_has_a_begin_token_puts_it_before_each_prompt():
    begin = {"SpecialToken": {"id": "<pad>", "type_id": 0}}
    template = TOKENIZER["post_processor"] | {
        "single": [begin, *TOKENIZER["post_processor"]["single"]],
        "special_tokens": {"<pad>": {"id": "<pad>", "ids": [0], "tokens": ["<pad>"]}},
    }
    tokenizer = TextTokenizer(json.dumps(TOKENIZER | {"post_processor": template}), eos_tokens=())
    assert tokenizer.encode("12") == [0, *abacus_tokenizer().encode("12")]


def test_an_empty_text_has_no_tokens():
    assert abacus_tokenizer().encode("") == []
    assert abacus_tokenizer().decode([]) == ""


def test_without_a_tokenizer_text_is_refused_and_tokens_have_no_text():
    tokenizer = TextTokenizer("", eos_tokens=(5, 7, 5))
    with pytest.raises(DataError, match="holds no tokenizer; give the prompt as tokens"):
        tokenizer.encode("12")
    assert tokenizer.decode([1, 2, 3]) == ""
    assert tokenizer.eos_tokens == {5, 7}
