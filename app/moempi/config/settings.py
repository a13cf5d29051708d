"""The settings of a Python program: keys of a job file without the prompts and results, which are values there."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import msgspec

from moempi.config.job import Job, Sampling
from moempi.config.reading import read_tree
from moempi.errors import ConfigError

ORIGIN = "LLM"
OF_FILES = ("model", "input.prompts", "input.column", "output.results", "task", "score.threshold", "trace", "replay")
"""Sections and keys of a job file that mean nothing without its files."""

_SECTIONS: dict[str, list[str]] = {
    field.name: [f"{field.name}.{key.name}" for key in msgspec.structs.fields(field.type)]
    for field in msgspec.structs.fields(Job)
    if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
}
_KEYS = [key for section, keys in _SECTIONS.items() for key in keys if section not in OF_FILES and key not in OF_FILES]


def read_settings(weights: str, settings: Mapping[str, Any]) -> tuple[Job, frozenset[str]]:
    """The job of an LLM with these settings, and the keys of `[sampling]` among them.

    A setting is a key of a job file by its last name, as `stages` for `parallel.stages`, or a section with a mapping of
    its keys. Raises ConfigError for one that is unknown, ambiguous, of files, or wrong.
    """
    tree: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        if name in _SECTIONS and isinstance(value, Mapping):
            tree.setdefault(name, {}).update(value)
        else:
            section, _, key = _full_key(name).partition(".")
            tree.setdefault(section, {})[key] = value
    for name in OF_FILES:
        section, _, key = name.partition(".")
        if section in tree and (not key or key in tree[section]):
            raise ConfigError(f"{ORIGIN}: {name} is for job files")
    files = {"model": {"weights": weights}, "input": {"prompts": ""}, "output": {"results": ""}}
    whole = tree | {section: files[section] | tree.get(section, {}) for section in files}
    return read_tree(whole, Job, origin=ORIGIN), frozenset(tree.get("sampling", {}))


def read_sampling(given: Mapping[str, Any], *, origin: str) -> dict[str, Any]:
    """The checked values of keys of `[sampling]`, all but `defaults`; raises ConfigError that begins with `origin`."""
    if "defaults" in given:
        raise ConfigError(f"{origin}: defaults is a setting of {ORIGIN}")
    checked = read_tree(dict(given), Sampling, origin=origin)
    return {key: getattr(checked, key) for key in given}


def _full_key(name: str) -> str:
    """The key `section.name` that a setting names; raises ConfigError if there is none, or several."""
    found = [key for key in _KEYS if name in (key, _last(key))]
    if len(found) > 1:
        sections = " or ".join(f"{key.removesuffix(f'.{name}')}={{{name!r}: ...}}" for key in found)
        raise ConfigError(f"{ORIGIN}: {name} is a key of several sections; write {sections}")
    if not found:
        near = get_close_matches(name, map(_last, _KEYS), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else "settings are the keys of [run], [parallel], [sampling], ..."
        raise ConfigError(f"{ORIGIN}: unknown setting {name}; {hint}")
    return found[0]


def _last(key: str) -> str:
    return key.partition(".")[2]
