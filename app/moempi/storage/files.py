"""Atomic writing of files."""

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from moempi.errors import NoInputError, StorageError

_STAT_BLOCK_BYTES = 512  # the unit of st_blocks
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of <linux/falloc.h>
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE of <linux/fs.h>
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; if the block succeeds, sync that file to disk and rename it to `path`.

    If the block raises, removes the temporary file and leaves `path` unchanged. Raises an OSError of the block as
    StorageError that names `path`. Blocks until the disk has the bytes.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise StorageError(f"{target}: exists and is not a regular file, choose another name")
    temporary = hidden_name(target)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        os.truncate(temporary, temporary.stat().st_size)  # frees what `reserve` allocated beyond the end
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def digest_file(path: str | Path) -> str:
    """BLAKE2b digest (hex) of a file's content; raises NoInputError if it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror or error}") from error


def hidden_name(target: Path) -> Path:
    """A new hidden name beside `target` for a temporary file or folder; `remove_hidden` removes it."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


def remove_hidden(target: str | Path) -> None:
    """Remove hidden files that a killed process left beside `target`; the caller must be its only writer."""
    target = Path(target)
    for left in target.parent.glob(f".{escape(target.name)}.{'[0-9a-f]' * 8}.part"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def reserve(path: str | Path, num_bytes: int) -> None:
    """Allocate disk blocks for the first `num_bytes` bytes of the file `path` without changing its size.

    Raises OSError if the disk, a quota or a limit is too small, and then keeps no block. Does nothing if the file
    system cannot allocate ahead: posix_fallocate would write every block there.
    """
    _require_free(Path(path), num_bytes)
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    with Path(path).open("r+b") as file:
        arguments = file.fileno(), _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(num_bytes)
        if fallocate(*arguments):
            code = ctypes.get_errno()
            os.ftruncate(
                file.fileno(), os.fstat(file.fileno()).st_size
            )  # a failed call may have allocated all free blocks
            if code not in _CANNOT_RESERVE:
                raise OSError(code, os.strerror(code))


def start_writing(descriptor: int) -> None:
    """Ask the kernel to start writing a file's dirty pages to disk; does not block and never fails."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        begin(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _START_WRITING)


def _require_free(path: Path, num_bytes: int) -> None:
    """Check the free space first, because a failing reservation fills the disk for a moment, for every process."""
    status = path.stat()
    allocated = min(status.st_blocks * _STAT_BLOCK_BYTES, status.st_size)
    if num_bytes - allocated > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {num_bytes:,} bytes are needed")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
