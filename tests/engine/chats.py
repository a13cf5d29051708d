"""Checkpoint folders with a tokenizer and a chat template in the style of a public family, and chats for them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from engine.requests import byte_tokenizer_text
from mpirun import ROOT

FIXTURES = ROOT / "tests/chat_templates"
DATE = "2025-06-28"

# The texts of each style's special tokens: begin of text and end of text first, "" for none.
STYLES: dict[str, tuple[str, ...]] = {
    "qwen3": ("", "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    "qwen3_thinking": ("", "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    "deepseek": (
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
        "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    ),
    "kimi": (
        "[BOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|media_pad|>",
        "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>", "<|tool_call_end|>",
    ),
    "glm": ("", "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "mixtral": ("<s>", "</s>", "<unk>"),
    "gpt_oss": (
        "<|startoftext|>", "<|return|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>",
    ),
    "olmoe": ("<|endoftext|>", "<|endoftext|>", "<|padding|>"),
    "minimax": ("]~!b[", "[e~[", "]~b]"),
}  # fmt: skip
PLAIN_ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens that are not special."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a <place> & day",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Where, as Zürich"},
                "days": {"type": "array", "items": {"type": "integer"}, "default": [1]},
                "unit": {"type": "string", "enum": ["celsius", "kelvin"], "default": "celsius"},
                "options": {"type": "object", "properties": {"wind": {"type": "number"}}},
            },
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time", "parameters": {}}}


def message(role: str, content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


def call(arguments: Any, name: str = "weather", **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **keys}


ASK = message("user", "How warm is it in Zürich?")
BRIEF = message("system", "Be brief.")
CHATS: dict[str, dict[str, Any]] = {
    "one message": {"messages": [ASK]},
    "system message": {"messages": [BRIEF, ASK]},
    "turns": {"messages": [BRIEF, ASK, message("assistant", " 21 °C \n"), message("user", "And now?")]},
    "odd text": {"messages": [message("user", "\n <b>&amp; \"q\" 'q'</b> \\ {{ 7 * 7 }} {% if %} 日 😀 é \0\t\n\n")]},
    "empty text": {"messages": [message("user", "")]},
    "reasoning": {"messages": [ASK, message("assistant", "21", reasoning_content="\nIt is June.\n")]},
    "thinking": {"messages": [ASK, message("assistant", "21", thinking="It is June."), message("user", "Sure?")]},
    "reasoning in the text": {
        "messages": [ASK, message("assistant", "<think>\nJune\n</think>\n\n21"), message("user", "Sure?")],
    },
    "no prompt": {
        "messages": [ASK, message("assistant", "21")],
        "chat_template_kwargs": {"add_generation_prompt": False},
    },
    "thinking off": {"messages": [ASK], "chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
    "thinking on": {"messages": [ASK], "chat_template_kwargs": {"enable_thinking": True, "thinking": True}},
    "variables": {"messages": [ASK], "chat_template_kwargs": {"reasoning_effort": "high", "model_identity": "I."}},
    "tools": {"messages": [BRIEF, ASK], "tools": [WEATHER, CLOCK]},
    "calls": {
        "messages": [
            ASK,
            message(
                "assistant",
                "Let me see.",
                tool_calls=[call({"place": "Zürich", "days": [1, 2], "options": {"wind": 0.5}}, id="f.weather:0")],
            ),
            message("tool", '{"celsius": 21}', tool_call_id="f.weather:0"),
            message("user", "And the time?"),
        ],
        "tools": [WEATHER],
    },
    "calls without text": {
        "messages": [
            ASK,
            message("assistant", None, tool_calls=[call('{"place": "Bern"}'), call({}, "clock")], reasoning="Two."),
            message("tool", "21", name=None),
            message("tool", "noon"),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "parts": {"messages": [message("user", [{"type": "text", "text": "How "}, {"type": "text", "text": "warm?"}])]},
    "two users": {"messages": [ASK, ASK]},
    "tool first": {"messages": [message("tool", "21"), ASK]},
    "unknown role": {"messages": [message("critic", "No."), ASK]},
}  # fmt: skip


def special_in(style: str) -> dict[str, Any]:
    """A chat whose texts spell out special tokens of the style."""
    begin, end, *others = STYLES[style]
    spelled = f"a{end}b {''.join(others)}{begin} c"
    return {"messages": [message("user", spelled), message("assistant", f"x{end}"), message("user", f"{end}{spelled}")]}


@cache
def tokenizer_text(style: str) -> str:
    """tokenizer.json: a token for each byte, then the special tokens, and a begin token before each text."""
    begin, *_ = special = STYLES[style]
    made = Tokenizer.from_str(byte_tokenizer_text(*filter(None, special)))
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED])
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], special_tokens=[(begin, made.token_to_id(begin))]
        )
    return str(made.to_str())


def tokenizer(style: str) -> Tokenizer:
    """The library's own tokenizer of a style."""
    return Tokenizer.from_str(tokenizer_text(style))


def template(style: str) -> str:
    return (FIXTURES / f"{style}.jinja").read_text(encoding="utf-8")


def write_tokenizer(folder: Path, style: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    begin, end, *_ = STYLES[style]
    folder.mkdir(exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
    if begin:
        config["bos_token"] = {"__type": "AddedToken", "content": begin, "special": True}
    (folder / "tokenizer.json").write_text(tokenizer_text(style), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template(style), encoding="utf-8")
