"""Reading what people wrote: TOML, JSON and `section.key=value` into frozen structs, with errors they can act on."""

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

    Raises NoInputError when the file cannot be read, UsageError for a malformed override, and ConfigError that names
    file, key and the nearest right key otherwise.
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
    return convert(tree, kind, where=str(path))


def read_json(path: str | Path, kind: type[S]) -> S:
    """Read a JSON file of at most MAX_JSON_BYTES as a `kind`.

    Raises NoInputError when the file cannot be read and ConfigError that names file and key otherwise.
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
    return convert(tree, kind, where=str(path))


def convert(tree: dict[str, Any], kind: type[S], *, where: str) -> S:
    """Check a decoded tree against `kind`; raises ConfigError that starts with `where` and names the key."""
    _refuse_unknown(tree, kind, where=where, prefix="")
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        key = place.rstrip("`").lstrip(".")
        raise ConfigError(f"{where}: {f'{key}: ' if key else ''}{message}") from error


def _refuse_unknown(tree: dict[str, Any], kind: type[msgspec.Struct], *, where: str, prefix: str) -> None:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in tree.items():
        if key not in fields:
            near = get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {hint}")
        section = fields[key]
        if isinstance(value, dict) and isinstance(section, type) and issubclass(section, msgspec.Struct):
            _refuse_unknown(value, section, where=where, prefix=f"{prefix}{key}.")


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
