"""Chats against transformers' `apply_chat_template`: texts, tokens, and special tokens that a message spells out."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize("style", chats.STYLES)
@pytest.mark.parametrize("text", ["", "12+34=", "{}a{}{} b{}", " {}{}", "{}{}x\n{}"])
def test_prompts_with_special_tokens_are_those_of_transformers(tmp_path: Path, style: str, text: str) -> None:
    theirs = peer.load(tmp_path / "theirs", style)
    tokenizer, _ = render(tmp_path / "ours", style)
    spelled = text.format(*[special for special in chats.STYLES[style] if special][:1] * 4)
    assert tokenizer.encode(spelled) == theirs(spelled)["input_ids"]
