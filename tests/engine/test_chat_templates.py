"""Templates in the styles of public families give the texts that transformers gave (tests/peers/chats.py)."""

import json
from datetime import datetime

import msgspec
import pytest

from engine import chats
from moempi.config.job import ChatSection, Sampling
from moempi.engine.chat import render_chats, template_day
from moempi.engine.tokenizer import TextTokenizer
from moempi.storage.chat_templates import read_chat_templates
from moempi.storage.prompts import Chat, Prompt

EXPECTED = json.loads((chats.FIXTURES / "expected.json").read_text(encoding="utf-8"))
SECTION = ChatSection(date=chats.DATE)


def make_prompts(*given):
    """A prompt for each chat."""
    return [
        Prompt(index, f"q{index}", None, None, None, Sampling(), chat=msgspec.json.encode(as_chat(chat)))
        for index, chat in enumerate(given)
    ]


def as_chat(chat):
    return Chat(chat["messages"], chat.get("tools"), chat.get("chat_template_kwargs", {}))


def render(folder, style, *given, section=SECTION):
    """The tokenizer of a style, and the texts of chats."""
    chats.write_tokenizer(folder, style)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = TextTokenizer(chats.tokenizer_text(style), eos_tokens=())
    templates, today = read_chat_templates(folder, config), template_day(section, datetime(2000, 1, 1))
    texts = render_chats(make_prompts(*given), templates, tokenizer, section=section, today=today)
    return tokenizer, list(texts.values())


@pytest.mark.parametrize("style", chats.STYLES)
def test_chats_have_the_texts_that_transformers_gives(tmp_path, style):
    assert EXPECTED[style].keys() == chats.CHATS.keys()
    _, texts = render(tmp_path, style, *chats.CHATS.values())
    found = {name: None if text.error else text.text for name, text in zip(chats.CHATS, texts, strict=True)}
    assert found == EXPECTED[style]
    assert all(text.error.startswith("the chat template cannot be applied: ") for text in texts if not text.text)


@pytest.mark.parametrize("style", chats.STYLES)
def test_special_tokens_are_what_the_template_writes_and_not_what_a_message_says(tmp_path, style):
    """The tokens are those of a chat whose messages are without special tokens, and the bytes of their texts."""
    spelled = chats.special_in(style)
    tokenizer, (text,) = render(tmp_path, style, spelled)
    tokens = tokenizer.encode_chat(text.text)
    harmless = json.loads(json.dumps(spelled))
    for number, message in enumerate(harmless["messages"]):
        message["content"] = f"({number})"
    _, (frame,) = render(tmp_path, style, harmless)
    plain = TextTokenizer(chats.tokenizer_text(style), eos_tokens=(), reads_special=False)
    begin = len(plain.encode(""))
    expected = []
    parts = frame.text
    for number, message in enumerate(spelled["messages"]):
        before, parts = parts.split(f"({number})")
        expected += [*tokenizer.encode_chat(before), *plain.encode(message["content"])[begin:]]
    assert tokens == expected + tokenizer.encode_chat(parts)
