"""Chats against transformers' `apply_chat_template`: texts, tokens, and special tokens that a message spells out."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")
peer = pytest.importorskip("peers.chats")

from engine import chats  # noqa: E402
from engine.test_chat_templates import EXPECTED, render  # noqa: E402


@pytest.mark.parametrize("style", chats.STYLES)
def test_texts_and_tokens_are_those_of_transformers(tmp_path: Path, style: str) -> None:
    theirs = peer.load(tmp_path / "theirs", style)
    tokenizer, ours = render(tmp_path / "ours", style, *chats.CHATS.values())
    for (name, chat), text in zip(chats.CHATS.items(), ours, strict=True):
        expected = peer.apply(theirs, chat, as_text=True)
        assert (None if text.error else text.text) == expected == EXPECTED[style][name], name
        if expected is not None:
            assert tokenizer.encode_chat(text.text) == peer.apply(theirs, chat, as_text=False), name


@pytest.mark.parametrize("style", chats.STYLES)
def test_a_special_token_in_a_message_is_text_as_where_transformers_sanitizes(tmp_path: Path, style: str) -> None:
    chat = chats.special_in(style)
    theirs = peer.load(tmp_path / "theirs", style)
    tokenizer, (text,) = render(tmp_path / "ours", style, chat)
    assert tokenizer.encode_chat(text.text) == peer.apply(theirs, chat, as_text=False, sanitize_control_tokens=True)


@pytest.fixture(scope="module", params=chats.STYLES)
def tokenizers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    """A style, the tokenizer of its folder as transformers loads it, and ours."""
    theirs = peer.load(tmp_path_factory.mktemp("theirs"), request.param)
    return request.param, theirs, render(tmp_path_factory.mktemp("ours"), request.param)[0]


@settings(deadline=None, max_examples=300)
@given(drawn=st.data())
def test_any_sequence_of_special_and_plain_texts_has_the_tokens_of_transformers(
    tokenizers: tuple[str, Any, Any], drawn: st.DataObject
) -> None:
    style, theirs, ours = tokenizers
    special = st.sampled_from([*filter(None, chats.STYLES[style]), *chats.PLAIN_ADDED])
    plain = st.text(max_size=4) | st.sampled_from([" ", "\n", "<|", "|>", "日", "é", "e\u0301", "<think", "im_end|>"])
    text = "".join(drawn.draw(st.lists(special | plain, max_size=10)))
    tokens = theirs(text)["input_ids"]
    assert ours.encode(text) == tokens
    assert ours.decode(tokens) == theirs.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("style", chats.STYLES)
@pytest.mark.parametrize("text", ["", "12+34=", "{}a{}{} b{}", " {}{}", "{}{}x\n{}"])
def test_prompts_with_special_tokens_are_those_of_transformers(tmp_path: Path, style: str, text: str) -> None:
    theirs = peer.load(tmp_path / "theirs", style)
    tokenizer, _ = render(tmp_path / "ours", style)
    spelled = text.format(*[special for special in chats.STYLES[style] if special][:1] * 4)
    assert tokenizer.encode(spelled) == theirs(spelled)["input_ids"]
