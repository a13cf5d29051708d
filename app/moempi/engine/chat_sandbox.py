"""The process that applies chat templates: a template is a program of whoever made the checkpoint.

It runs in jinja2's sandbox and in a process of its own, whose memory and time are limited, so that the worst it can do
is to end this process. The first line of stdin has the templates, each further line a chat. Each line gets one on
stdout, in JSON: the first {}, a chat either {"text": ...} or {"error": ...}.
"""

import json
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2 << 30
LIMIT_S = 1.0
LIMIT_S_PER_BYTE = 1e-6
GRACE_S = 2
"""Seconds of processor time after which a step that cannot be interrupted ends the process."""
MAX_TEXT = 1 << 20
"""Characters of a text beyond 16 for each byte of its chat."""
MAX_REASON = 200

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what a model thought before a message; templates read the first or the second."""


class TooLongError(BaseException):
    """The time of a chat is over; no `except Exception` in a library stops it."""


class _Generation(Extension):  # type: ignore[misc]
    """`{% generation %}`, which marks for training what the model writes; its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 as its base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def make_environment(today: datetime) -> ImmutableSandboxedEnvironment:
    """An environment with the functions and filters that chat templates may expect."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = today.strftime
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


class Renderer:
    """Applies templates to chats."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], today: datetime) -> None:
        self._environment = make_environment(today)
        self._sources, self._special_tokens = templates, special_tokens
        self._compiled: dict[str, Any] = {}

    def render(self, chat: Mapping[str, Any]) -> str:
        """The text of a chat; raises what its template raises."""
        tools, variables = chat["tools"], chat["template_kwargs"]
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            raise TemplateError(f"the templates have the names {', '.join(self._sources)}, none is {name}")
        if name not in self._compiled:
            self._compiled[name] = self._environment.from_string(self._sources[name])
        given = {"documents": None, **self._special_tokens, **variables}
        messages = [_message(message) for message in chat["messages"]]
        return str(self._compiled[name].render({**given, "messages": messages, "tools": tools}))


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without keys that have no value, and its reasoning by both names that templates read."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = next((given[name] for name in REASONING if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def reply(renderer: Renderer, line: bytes) -> dict[str, str]:
    """The reply to a line: the text, or the reason why there is none."""
    try:
        with _limited_time(LIMIT_S + LIMIT_S_PER_BYTE * len(line)):
            text = renderer.render(json.loads(line))
    except TooLongError:
        return {"error": "it takes too long"}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except RecursionError:
        return {"error": "it, or the chat, is nested too deeply"}
    except TemplateError as error:
        return {"error": _first_line(str(error.message)) or type(error).__name__}
    except Exception as error:
        return {"error": _first_line(f"{type(error).__name__}: {error}")}
    if len(text) > MAX_TEXT + 16 * len(line):
        return {"error": f"its text has {len(text):,} characters"}
    return {"text": text}


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:MAX_REASON]


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """Raise TooLongError after so much processor time, and again and again; GRACE_S later, end the process."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + GRACE_S, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _raise_too_long(*_: Any) -> None:
    raise TooLongError


def _limit(kind: int, value: int) -> None:
    """Lower a limit of this process."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main() -> None:
    """Reply to each line of stdin."""
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    signal.signal(signal.SIGPROF, _raise_too_long)
    lines = sys.stdin.buffer
    begin = json.loads(lines.readline())
    renderer = Renderer(begin["templates"], begin["special_tokens"], datetime.fromisoformat(begin["today"]))
    _write({})
    for line in lines:
        _write(reply(renderer, line))


def _write(line: Mapping[str, str]) -> None:
    sys.stdout.buffer.write(json.dumps(line).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
