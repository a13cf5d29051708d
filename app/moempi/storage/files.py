"""Writing a file so that it is there whole or not at all."""

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

BLOCK_BYTES = 512  # the unit of st_blocks
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of <linux/falloc.h>
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE of <linux/fs.h>
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well its file is synced to disk and becomes `path`.

    When the block raises, the temporary file is removed and whatever `path` was before stays. OSErrors of the block
    are raised as StorageError that names `path`. Blocks until the disk has the bytes.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise StorageError(f"{target}: exists and is not a regular file, choose another name")
    temporary = hidden_name(target)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        os.truncate(temporary, temporary.stat().st_size)  # gives back what `reserve` took beyond the end
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def digest_file(path: str | Path) -> str:
    """BLAKE2b digest (hex) of a file's content; raises NoInputError when it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror or error}") from error


def hidden_name(target: Path) -> Path:
    """A fresh name beside `target` for what is not to be seen under a name of its own; see `remove_hidden`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


def remove_hidden(target: str | Path) -> None:
    """Remove what a killed process left beside `target` under hidden names; only for who alone writes `target`."""
    target = Path(target)
    for left in target.parent.glob(f".{escape(target.name)}.{'[0-9a-f]' * 8}.part"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def reserve(path: str | Path, num_bytes: int) -> None:
    """Make sure that the disk has room for the first `num_bytes` bytes of the file `path`, whose size stays.

    Raises OSError when the disk, a quota or a limit is too small. Where the system or the file system cannot reserve,
    nothing happens: posix_fallocate would write every block there. A reservation that fails leaves nothing taken.
    """
    _require_free(Path(path), num_bytes)
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:
        return
    with Path(path).open("r+b") as file:
        arguments = file.fileno(), _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(num_bytes)
        if fallocate(*arguments):
            code = ctypes.get_errno()
            os.ftruncate(file.fileno(), os.fstat(file.fileno()).st_size)  # it may have taken all there was
            if code not in _CANNOT_RESERVE:
                raise OSError(code, os.strerror(code))


def start_writing(descriptor: int) -> None:
    """Have the system begin to write what it holds of a file to disk; does not wait for it. A hint: never fails."""
    begin = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if begin is not None:
        begin(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _START_WRITING)


def _require_free(path: Path, num_bytes: int) -> None:
    """Refuse before anything is taken: a reservation that fails fills the disk for a moment, for everyone."""
    status = path.stat()
    taken = min(status.st_blocks * BLOCK_BYTES, status.st_size)
    if num_bytes - taken > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {num_bytes:,} bytes are needed")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
