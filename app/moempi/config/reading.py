"""Reading of TOML, JSON and `section.key=value` into frozen structs, with errors that name file, key and remedy."""

import tomllib
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from moempi.errors import ConfigError, NoInputError, UsageError

S = TypeVar("S", bound=msgspec.Struct)

MAX_JSON_BYTES = 64 << 20


def read_toml(path: str | Path, kind: type[S], *, overrides: Iterable[str] = ()) -> S:
    """Read a TOML file as a `kind`; each override is `section.key=value`, the value in TOML or a bare word.

    Raises NoInputError if the file cannot be read, UsageError for a malformed override, and ConfigError that names
    file, key and the nearest known key for anything else.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NoInputError(f"{path}: cannot be read: {error}") from error
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return read_tree(tree, kind, origin=str(path))


def read_json(path: str | Path, kind: type[S]) -> S:
    """Read a JSON file of at most MAX_JSON_BYTES as a `kind`.

    Raises NoInputError if the file cannot be read and ConfigError that names file and key for anything else.
    """
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_JSON_BYTES:
        raise ConfigError(f"{path}: longer than {MAX_JSON_BYTES >> 20} MiB")
    try:
        tree = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON object: {error}") from error
    return read_tree(tree, kind, origin=str(path))


def read_tree(tree: dict[str, Any], kind: type[S], *, origin: str) -> S:
    """Read a decoded tree as a `kind`; raises ConfigError that begins with `origin` and names the key."""
    _refuse_unknown(tree, kind, origin=origin, prefix="")
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        raise ConfigError(f"{origin}: {f'{key}: ' if key else ''}{message}") from error


def _refuse_unknown(tree: dict[str, Any], kind: type[msgspec.Struct], *, origin: str, prefix: str) -> None:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in tree.items():
        if key not in fields:
            near = get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(fields)}"
            raise ConfigError(f"{origin}: unknown key {prefix}{key}; {hint}")
        section = fields[key]
        if isinstance(value, dict) and isinstance(section, type) and issubclass(section, msgspec.Struct):
            _refuse_unknown(value, section, origin=origin, prefix=f"{prefix}{key}.")


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not key or not all(sections):
        raise UsageError(f"--set {override}: write section.key=value, for example run.micro_batches=4")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"--set {override}: {section} is a value, not a section")
    tree[key] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
