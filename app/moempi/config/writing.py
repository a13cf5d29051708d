"""Writing of a job as a TOML file: the reverse of `reading`."""

import json
import os
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

import msgspec

from moempi.config.job import INPUTS, OUTPUTS, Job
from moempi.config.reading import STDIN


def job_text(job: Job, folder: str | Path) -> str:
    """The job file of a job for this folder: all keys that differ from their defaults, and paths relative to it.

    The paths of the job are relative to the current folder, as `read_job_file` returns them.
    """
    tree = _given(job)
    for key in (*INPUTS, *OUTPUTS):
        section, name = key.split(".")
        path = tree.get(section, {}).get(name, "")
        if path not in ("", STDIN) and not Path(path).is_absolute():
            # Folders are resolved, because `..` behind a symbolic link would lead elsewhere.
            real = Path(os.path.realpath(Path(path).parent), Path(path).name)
            tree[section][name] = os.path.relpath(real, os.path.realpath(folder))
    lines = [f"{key} = {_value(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    for section, keys in tree.items():
        if isinstance(keys, dict):
            lines += ["", f"[{section}]", *(f"{key} = {_value(value)}" for key, value in keys.items())]
    return "\n".join([*lines, ""])


def _given(struct: msgspec.Struct) -> dict[str, Any]:
    """The values of a struct that differ from their defaults, also in its sections."""
    found = {}
    for field in msgspec.structs.fields(struct):
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        value = getattr(struct, field.name)
        if value != default:
            found[field.encode_name] = _given(value) if isinstance(value, msgspec.Struct) else value
    return found


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)  # as TOML, also inf and nan
        case str():
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case date() | datetime() | time():
            return value.isoformat()
        case dict():
            return f"{{{', '.join(f'{_value(str(key))} = {_value(one)}' for key, one in value.items())}}}"
        case _:
            return f"[{', '.join(map(_value, value))}]"
