"""The chat templates of a checkpoint: where its folder has them, and their text in a weight file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from moempi.config.input_file import read_input
from moempi.errors import DataError

MAX_TEMPLATE_BYTES = 1 << 22
MAX_TEMPLATES = 100
DEFAULT = "default"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplates(Struct, frozen=True, forbid_unknown_fields=True):
    """Chat templates by name, and the texts of special tokens by the names that templates have for them."""

    templates: dict[str, str]
    special_tokens: dict[str, str]


def read_chat_templates(folder: Path, config: Mapping[str, Any]) -> ChatTemplates | None:
    """The chat templates of a checkpoint folder, None if there is none; `config` is its tokenizer_config.json.

    Files of templates replace what `config` has. Raises NoInputError for a file that cannot be read, DataError for a
    template that is not text.
    """
    templates = _template_files(folder) or _templates(config.get("chat_template"), folder / "tokenizer_config.json")
    if not templates:
        return None
    tokens = {name: _content(config.get(name)) for name in SPECIAL_TOKENS}
    return ChatTemplates(templates, {name: text for name, text in tokens.items() if text})


def _template_files(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if os.path.lexists(folder / "chat_template.jinja"):
        files[DEFAULT] = folder / "chat_template.jinja"
    if len(files) > MAX_TEMPLATES:
        raise DataError(f"{folder}: holds more than {MAX_TEMPLATES} chat templates")
    return {name: _read_text(path) for name, path in files.items()}


def _templates(found: Any, origin: Path) -> dict[str, str]:
    """The templates in tokenizer_config.json: one text, or a list of objects with a name and a text."""
    named = [{"name": DEFAULT, "template": found}] if isinstance(found, str) else found or []
    try:
        entries = msgspec.convert(named, list[_Named])
    except (msgspec.ValidationError, RecursionError) as error:
        raise DataError(f"{origin}: chat_template: {error}") from error
    return {entry.name: entry.template for entry in entries}


class _Named(Struct):
    name: str
    template: str


def _content(token: Any) -> str:
    """The text of a special token, which is a text or an object with `content`; "" for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _read_text(path: Path) -> str:
    try:
        return read_input(path, limit=MAX_TEMPLATE_BYTES, too_long=DataError).decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
