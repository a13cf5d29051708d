"""Opening of input files: regular files only, because reading a FIFO or a device may never end."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from moempi.errors import MoempiError, NoInputError


def file_mode(path: str | Path) -> int:
    """The type and permissions (st_mode) of what `path` names; 0 if it names nothing that can be reached."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):
        return 0


def open_input(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; raises NoInputError if it is none, or cannot be opened."""
    try:
        if stat.S_ISREG(Path(path).stat().st_mode):
            return Path(path).open("rb")
        reason = "it is not a regular file"
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise NoInputError(f"{str(path)!r}: cannot be read: {error}") from error
    raise NoInputError(f"{path}: cannot be read: {reason}")


def read_input(path: str | Path, *, limit: int, too_long: type[MoempiError]) -> bytes:
    """Read a regular file; raises NoInputError if it cannot be read, `too_long` if it has more than `limit` bytes."""
    with open_input(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise too_long(f"{path}: is longer than {limit:,} bytes")
        try:
            return file.read()
        except OSError as error:
            raise NoInputError(f"{path}: cannot be read: {error.strerror or error}") from error
