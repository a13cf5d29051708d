"""Reading of TOML, JSON and `section.key=value` into frozen structs, with errors that name file, key and remedy."""

import os
import re
import tomllib
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from moempi.config.input_file import file_mode, read_input
from moempi.errors import ConfigError, NoInputError, UsageError

S = TypeVar("S", bound=msgspec.Struct)

STDIN = "-"
"""The name of stdin where a path is expected."""
HDF5_BEGIN = b"\x89HDF\r\n\x1a\n"
MAX_TOML_BYTES = 256 << 10
MAX_JSON_BYTES = 4 << 20
MAX_KEY_PARTS = 16
MAX_KEY_LENGTH = 64  # of a key in a message
MAX_MESSAGE_LENGTH = 200

# Possessive quantifiers, and no line breaks among the blanks: no text makes the search take more than linear time.
_KEY_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+"""
_LONG_KEY = re.compile(rf"(?:^|[\[{{,])[ \t]*+(?:{_KEY_PART}){{{MAX_KEY_PARTS}}}", re.MULTILINE)


def read_toml(
    path: str | Path,
    kind: type[S],
    *,
    overrides: Iterable[str] = (),
    inputs: Iterable[str] = (),
    outputs: Iterable[str] = (),
) -> S:
    """Read a TOML file as a `kind`; each override is `section.key=value`, the value in TOML or a bare word.

    `inputs` and `outputs` are keys that name files: in the TOML file relative to its folder, in an override relative to
    the current folder. The paths returned are all relative to the current folder, or absolute.
    Raises NoInputError if the file cannot be read, UsageError for a malformed override, and ConfigError that names
    file, key and the nearest known key for anything else.
    """
    content = read_input(path, limit=MAX_TOML_BYTES, too_long=ConfigError)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        found = "it is an HDF5 file; give a TOML file" if content.startswith(HDF5_BEGIN) else str(error)
        raise NoInputError(f"{path}: not TOML: {found}") from error
    try:
        tree = _parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for key in inputs:
        _anchor(tree, key, Path(path), is_input=True)
    for key in outputs:
        _anchor(tree, key, Path(path), is_input=False)
    for override in overrides:
        _apply(tree, override)
    return read_tree(tree, kind, origin=str(path))


def given_keys(path: str | Path, section: str, *, overrides: Iterable[str] = ()) -> frozenset[str]:
    """The keys of a section that a TOML file or an override gives, of a file that `read_toml` has read.

    Raises ConfigError if it is no longer TOML, NoInputError if it cannot be read.
    """
    try:
        tree = _parse_toml(read_input(path, limit=MAX_TOML_BYTES, too_long=ConfigError).decode())
    except ValueError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error
    for override in overrides:
        _apply(tree, override)
    return frozenset(tree.get(section, {}))


def read_json(path: str | Path, kind: type[S]) -> S:
    """Read a JSON file of at most MAX_JSON_BYTES as a `kind`.

    Raises NoInputError if the file cannot be read and ConfigError that names file and key for anything else.
    """
    content = read_input(path, limit=MAX_JSON_BYTES, too_long=ConfigError)
    try:
        tree = msgspec.json.decode(content, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a JSON object: {error}") from error
    return read_tree(tree, kind, origin=str(path))


def read_tree(tree: dict[str, Any], kind: type[S], *, origin: str) -> S:
    """Read a decoded tree as a `kind`; raises ConfigError that begins with `origin` and names the key."""
    _refuse_unknown(tree, kind, origin=origin, prefix="")
    try:
        return msgspec.convert(tree, kind, str_keys=True)
    except (ValueError, OverflowError, RecursionError) as error:
        message, _, path = str(error).partition(" - at `$")
        key = path.rstrip("`").lstrip(".")
        raise ConfigError(f"{origin}: {f'{key}: ' if key else ''}{message[:MAX_MESSAGE_LENGTH]}") from error


def _refuse_unknown(tree: dict[str, Any], kind: type[msgspec.Struct], *, origin: str, prefix: str) -> None:
    fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in tree.items():
        if key not in fields:
            key = key[:MAX_KEY_LENGTH]
            near = get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys are {', '.join(fields)}"
            raise ConfigError(f"{origin}: unknown key {prefix}{key}; {hint}")
        section = fields[key]
        if isinstance(value, dict) and isinstance(section, type) and issubclass(section, msgspec.Struct):
            _refuse_unknown(value, section, origin=origin, prefix=f"{prefix}{key}.")


def _anchor(tree: dict[str, Any], key: str, origin: Path, *, is_input: bool) -> None:
    """Make a path relative to the current folder that is relative to the folder of the file `origin`.

    Raises NoInputError if it is an input that only the current folder has.
    """
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.get(section, {})
        if not isinstance(tree, dict):
            return
    text = tree.get(name)
    if not isinstance(text, str) or text in ("", STDIN):
        return
    path = tree[name] = _without_dots(os.path.join(origin.parent, text))  # noqa: PTH118  # a Path would change the text
    if is_input and file_mode(text) and not file_mode(path):
        near = os.path.relpath(text, origin.parent)
        raise NoInputError(f"{origin}: {key}: no file {path}; paths are relative to the job file: write {near!r}")


def _without_dots(path: str) -> str:
    """The path without `.` and `..`, unless a symbolic link gives these another meaning."""
    short = os.path.normpath(path)
    with suppress(ValueError):  # a NUL, which is refused where the file is opened
        return short if os.path.realpath(short) == os.path.realpath(path) else path
    return path


def _apply(tree: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    *sections, key = path.strip().split(".")
    if not equals or not key or not all(sections):
        raise UsageError(f"--set {override[:MAX_KEY_LENGTH]}: write section.key=value, for example run.micro_batches=4")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise UsageError(f"--set {override[:MAX_KEY_LENGTH]}: {section[:MAX_KEY_LENGTH]} is a value, not a section")
    tree[key] = _toml_value(text.strip())


def _toml_value(text: str) -> Any:
    try:
        tree = _parse_toml(f"value = {text}")
    except ValueError:
        return text
    return tree["value"] if len(tree) == 1 else text  # a second line is a key of its own


def _parse_toml(text: str) -> dict[str, Any]:
    """Parse TOML; raises ValueError, also for what would take the parser very long or too deep."""
    if _LONG_KEY.search(text):
        raise ValueError(f"a dotted key has more than {MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
