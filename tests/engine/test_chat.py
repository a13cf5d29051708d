"""A chat template is a program of others: whatever it does, it ends as the error of its chat."""

import os
import re
import time
from datetime import datetime

import pytest

from engine.requests import byte_tokenizer
from engine.test_chat_templates import make_prompts
from moempi.config.job import ChatSection
from moempi.engine.chat import render_chats, template_day
from moempi.errors import ConfigError, StorageError
from moempi.storage.chat_templates import ChatTemplates

TOKENIZER = byte_tokenizer("<s>", "<|end|>")
TODAY = datetime(2025, 12, 31)
SECTION = ChatSection()
HI = {"messages": [{"role": "user", "content": "hi"}]}
LIMIT_S = 60.0  # two seconds of a processor, and what a busy machine adds


def render(template, *given, section=SECTION, **templates):
    named = ChatTemplates({"default": template, **templates}, {"bos_token": "<s>"})
    texts = render_chats(make_prompts(*given), named, TOKENIZER, section=section, today=TODAY)
    assert list(texts) == list(range(len(given)))
    return [text.error or text.text for text in texts.values()]


TOO_LONG, TOO_LARGE, UNSAFE, TOO_DEEP = "takes too long", "too much memory", "unsafe", "nested too deeply"
EITHER = "too (long|much)|ended its process|characters"
HOSTILE = [
    ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", TOO_LONG),
    ("{% macro f(n) %}{% for i in range(99) %}{{ f(n - 1) if n }}{% endfor %}{% endmacro %}{{ f(9) }}", EITHER),
    ("{{ 'x' * 10 ** 10 }}", TOO_LARGE),
    ("{{ [1] * 10 ** 10 }}", TOO_LARGE),
    ("{{ 'x' | center(10 ** 11) }}", TOO_LARGE),
    ("{{ '{:5000000000}'.format(1) }}", TOO_LARGE),
    ("{{ ('x' * 10 ** 6) | replace('x', 'y' * 10 ** 6) }}", TOO_LARGE),
    ("{{ '%3000000000d' % 1 }}", EITHER),
    ("{{ 9 ** (9 ** 9) }}", EITHER),
    ("{{ messages | tojson(indent=10 ** 9) }}", EITHER),
    ("{{ lipsum(n=10 ** 6) }}", EITHER),
    ("{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", EITHER),
    ("{% for i in range(5000) %}{{ 'x' * 9999 }}{% endfor %}", "its text has 49,995,000 characters"),
    ("{{ range(10 ** 6) }}", "Range too big"),
    ("{{ ''.__class__.__base__.__subclasses__() }}", UNSAFE),
    ("{{ messages.append(1) }}", UNSAFE),
    ("{{ cycler.__init__.__globals__ }}", UNSAFE),
    ("{{ raise_exception('no\\nsystem') }}", "cannot be applied: no$"),
    ("{{ raise_exception('n' * 10 ** 6) }}", "cannot be applied: n{200}$"),
    ("{{ nothing.at.all }}", "'nothing' is undefined"),
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ messages[0].content + 1 }}", "TypeError"),
    ("{% if %}", "Expected an expression"),
    ("{% include '/etc/passwd' %}", "no loader"),
    ("{{ " + "(" * 10_000 + ")" * 10_000 + " }}", TOO_DEEP),
    ("{{ " + "-" * 10_000 + "1 }}", TOO_DEEP),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", TOO_DEEP),
    ("{{ '\\ud800' }}", "is not UTF-8"),
]


@pytest.mark.parametrize(("template", "reason"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_makes_an_error_at_once(template, reason):
    begin = time.monotonic()
    (error,) = render(template, HI)
    assert time.monotonic() - begin < LIMIT_S
    assert re.search(reason, error), error
    assert error.startswith("the chat template cannot be applied: ")
    assert len(error) < 300


def test_an_error_is_of_one_chat_and_an_ended_process_is_started_again():
    template = "{{ messages[0].content * messages[0].times }}"
    large = {"messages": [{"role": "user", "content": "hi", "times": 10**10}]}
    once = {"messages": [{"role": "user", "content": "hi", "times": 1}]}
    found = render(template, once, large, once, large, once)
    assert [text == "hi" for text in found] == [True, False, True, False, True]


def test_a_crash_of_the_interpreter_is_the_error_of_one_chat():
    """The hash of nested tuples overflows the stack."""
    deeper = "(" * 32 + "ns.x" + ",)" * 32
    nest = "{% for _ in range(messages[0].depth) %}{% set ns.x = " + deeper + " %}{% endfor %}"
    template = "{% set ns = namespace(x=1) %}" + nest + "{% set found = {ns.x: 1} %}ok"
    flat, deep = ({"messages": [{"role": "user", "depth": depth}]} for depth in (1, 31_000))
    ended = "the chat template cannot be applied: it ended its process"
    assert render(template, flat, deep, flat, deep) == ["ok", ended, "ok", ended]


def test_variables_of_a_line_come_before_those_of_the_job_and_special_tokens_and_messages_before_neither():
    template = "{{ bos_token }}|{{ eos_token }}|{{ a }}|{{ b }}|{{ add_generation_prompt }}|{{ messages[0].content }}"
    section = ChatSection(template_kwargs={"a": "job", "b": "job", "messages": "x"})
    own = HI | {"chat_template_kwargs": {"b": "line", "messages": "y", "add_generation_prompt": 0, "eos_token": "e"}}
    assert render(template, HI, own, section=section) == ["<s>||job|job|True|hi", "<s>|e|job|line|0|hi"]
    assert render(template, HI, section=ChatSection(add_generation_prompt=False)) == ["<s>||||False|hi"]


def test_tools_choose_the_template_for_them():
    tools = HI | {"tools": [{"name": "a"}]}
    assert render("plain", HI, tools, tool_use="{{ tools[0].name }}") == ["plain", "a"]
    assert render("{{ tools }}", HI, tools) == ["None", "[{'name': 'a'}]"]


def test_the_day_is_that_of_the_job_or_of_its_start():
    section = ChatSection(date="2024-02-29")
    assert template_day(section, TODAY) == datetime(2024, 2, 29)
    assert template_day(ChatSection(), TODAY) == TODAY
    assert render("{{ strftime_now('%d %b %Y') }}", HI) == ["31 Dec 2025"]
    with pytest.raises(ConfigError, match=r"chat\.date: 2025-02-29 is not a day"):
        template_day(ChatSection(date="2025-02-29"), TODAY)


def test_what_marks_training_text_and_leaves_loops_is_known():
    template = (
        "{% for m in [1, 2, 3] %}{% if m == 2 %}{% continue %}{% endif %}{% generation %}{{ m }}{% endgeneration %}"
    )
    assert render(template + "{% endfor %}", HI) == ["13"]


def test_a_process_that_cannot_start_is_no_fault_of_a_chat(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(StorageError, match="ends at its start: is jinja2 installed"):
        render("x", HI)


def test_without_a_template_a_chat_is_an_error():
    (text,) = render_chats(make_prompts(HI), None, TOKENIZER, section=ChatSection(), today=TODAY).values()
    assert text.error == "the weight file holds no chat template; give prompt or tokens"


def test_a_chat_with_the_code_points_of_quotes_or_nested_too_deeply_is_an_error():
    deep = "x"
    for _ in range(600):
        deep = [deep]
    odd = [{"messages": [{"role": "user", "content": content}]} for content in ("a\ufdd05\ufdd0", deep)]
    private, nested, plain = render("{{ messages[0].content | string | length }}", *odd, HI)
    assert private == "the chat holds U+FDD0 or U+FDD1, which are not characters"
    assert TOO_DEEP in nested
    assert plain == "2"
