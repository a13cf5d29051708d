"""Chats become texts: the chat template of the weight file, applied by a process of its own (`chat_sandbox`)."""

import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime
from typing import Any

import msgspec
from msgspec import Struct

from moempi.config.job import ChatSection
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import ConfigError, DataError, StorageError
from moempi.storage.chat_templates import ChatTemplates
from moempi.storage.closeable import Closeable
from moempi.storage.prompts import Chat, Prompt

SANDBOX = "moempi.engine.chat_sandbox"


class ChatText(Struct, frozen=True):
    """The text of a chat, in which `TextTokenizer.quote` has marked what is no special token; or an error."""

    text: str = ""
    error: str = ""


def template_day(section: ChatSection, now: datetime) -> datetime:
    """The time that a template is given: `chat.date`, or `now`. Raises ConfigError for a date that does not exist."""
    try:
        return datetime.fromisoformat(section.date) if section.date else now
    except ValueError as error:
        raise ConfigError(f"chat.date: {section.date} is not a day: {error}") from error


def render_chats(
    prompts: Iterable[Prompt],
    templates: ChatTemplates | None,
    tokenizer: TextTokenizer,
    *,
    section: ChatSection,
    today: datetime,
    on_chat: Callable[[], None] = lambda: None,
) -> dict[int, ChatText]:
    """The text of each chat among the prompts, by the index of its prompt; calls `on_chat` before each.

    What the messages, tools and variables of a chat say is quoted: only the template itself writes special tokens. A
    template that fails, takes too long or needs too much memory makes an error of this chat. Raises StorageError if no
    process can be started. Blocks.
    """
    chats = [(prompt.index, prompt.chat) for prompt in prompts if prompt.chat is not None]
    if templates is None:
        return {
            index: ChatText(error="the weight file holds no chat template; give prompt or tokens") for index, _ in chats
        }
    texts = {}
    with ChatRenderer(templates, tokenizer, section=section, today=today) as renderer:
        for index, chat in chats:
            on_chat()
            texts[index] = renderer.render(chat)
    return texts


class ChatRenderer(Closeable):
    """Renders one chat after another in one process, which `close` ends."""

    def __init__(
        self, templates: ChatTemplates, tokenizer: TextTokenizer, *, section: ChatSection, today: datetime
    ) -> None:
        self._sandbox = _Sandbox(templates, today)
        self._tokenizer = tokenizer
        self._defaults = {"add_generation_prompt": section.add_generation_prompt, **section.template_kwargs}

    def render(self, chat: bytes) -> ChatText:
        """The text or the error of the JSON of a `Chat`; blocks. Raises StorageError: see `render_chats`."""
        try:
            given = msgspec.json.decode(chat, type=Chat)
            variables = self._defaults | given.template_kwargs
            quoted = _quoted(msgspec.to_builtins(Chat(given.messages, given.tools, variables)), self._tokenizer)
            found = self._sandbox.reply(msgspec.json.encode(quoted))
            error = f"the chat template cannot be applied: {found.error}" if found.error else ""
            return ChatText(found.text, error)
        except DataError as error:
            return ChatText(error=str(error))
        except RecursionError:
            return ChatText(error="the chat is nested too deeply")

    def close(self) -> None:
        """End the process."""
        self._sandbox.close()


def _quoted(value: Any, tokenizer: TextTokenizer) -> Any:
    """The value with every text in it quoted, except for keys."""
    if isinstance(value, str):
        return tokenizer.quote(value)
    if isinstance(value, list):
        return [_quoted(entry, tokenizer) for entry in value]
    if isinstance(value, dict):
        return {key: _quoted(entry, tokenizer) for key, entry in value.items()}
    return value


class _Sandbox(Closeable):
    """The process that applies templates; one that ended is started again for the next chat."""

    def __init__(self, templates: ChatTemplates, today: datetime) -> None:
        self._begin = msgspec.json.encode({**msgspec.to_builtins(templates), "today": today.isoformat()}) + b"\n"
        self._process: subprocess.Popen[bytes] | None = None

    def reply(self, chat: bytes) -> ChatText:
        """The text or the error of a chat; blocks."""
        if self._process is None:
            self._process = self._start()
        line = _exchange(self._process, chat + b"\n")
        if not line:
            self.close()
            return ChatText(error="it ended its process")
        try:
            return msgspec.json.decode(line, type=ChatText)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return ChatText(error="its text is not UTF-8")

    def _start(self) -> "subprocess.Popen[bytes]":
        try:
            # A session of its own: Ctrl-C ends the job at a step, and no chat.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", SANDBOX],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise StorageError(f"the process for chat templates cannot be started: {error.strerror}") from error
        if not _exchange(process, self._begin):
            raise StorageError("the process for chat templates ends at its start: is jinja2 installed?")
        return process

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._process = None


def _exchange(process: "subprocess.Popen[bytes]", line: bytes) -> bytes:
    """Write a line and read the reply, b"" if the process has ended."""
    with suppress(BrokenPipeError):
        if process.stdin and process.stdout:
            process.stdin.write(line)
            process.stdin.flush()
            return process.stdout.readline()
    return b""
