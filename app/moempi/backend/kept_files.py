"""Compiled kernels that are kept in the user's cache folder, so that each is compiled once.

A kept file is the compiled content, followed by its hash. Only files and folders of users whom the caller trusts are
used.
"""

import logging
import os
import stat
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import xxhash

HASH_BYTES = 16
MAX_BYTES = 64 << 20
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

log = logging.getLogger(__name__)


@cache
def warn_once(text: str) -> None:
    """Log a warning once."""
    log.warning("%s", text)


def kept_folder(trusted: set[int]) -> Path | None:
    """The folder of kept files; None if it cannot be made or another user could write to it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # noqa: PTH111  # Path.expanduser may raise
    folder = Path(base) / "moempi"
    if not folder.is_absolute():
        return None
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        problem = _problem(folder.stat(), trusted)
    except OSError as error:
        log.info("%s: no compiled kernels are kept: %s", folder, error.strerror)
        return None
    if problem:
        warn_once(f"{folder}: not used for compiled kernels: {problem}")
    return None if problem else folder


def _problem(found: os.stat_result, trusted: set[int]) -> str:
    """Why a file or folder is not trusted; "" if it is."""
    if found.st_uid not in trusted:
        return f"it belongs to user {found.st_uid}"
    return "other users may write to it" if found.st_mode & WRITABLE_BY_OTHERS else ""


def read_kept(path: Path, trusted: set[int]) -> bytes | None:
    """The content of a kept file; None if the file is absent, damaged or not trusted."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            if problem := _problem(os.fstat(file.fileno()), trusted):
                warn_once(f"{path}: not loaded: {problem}")
                return None
            content = file.read(MAX_BYTES)
    except OSError:
        return None
    compiled, digest = content[:-HASH_BYTES], content[-HASH_BYTES:]
    if digest != xxhash.xxh3_128_digest(compiled):
        log.info("%s: damaged, compiled again", path)
        return None
    return compiled


def keep(content: bytes, path: Path) -> None:
    """Write a compiled kernel and its hash, whole or not at all. A failure is logged and nothing else."""
    made = None
    try:
        descriptor, made = tempfile.mkstemp(dir=path.parent)  # mode 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(content + xxhash.xxh3_128_digest(content))
            file.flush()
            os.fsync(descriptor)
        Path(made).replace(path)
    except OSError as error:
        log.info("%s: not kept: %s", path, error.strerror)
        if made is not None:
            with suppress(OSError):
                Path(made).unlink()
