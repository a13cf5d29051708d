"""Atomic writing of files, and the refusal of outputs that would replace an input or cannot be written."""

import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from moempi.config.input_file import open_input
from moempi.errors import NoInputError, StorageError

_STAT_BLOCK_BYTES = 512  # the unit of st_blocks
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of <linux/falloc.h>
_START_WRITING = 2  # SYNC_FILE_RANGE_WRITE of <linux/fs.h>
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def atomic(path: str | Path, *, before_replace: Callable[[Path], object] = lambda file: None) -> Iterator[Path]:
    """Give a temporary path beside `path`; if the block succeeds, sync that file to disk and rename it to `path`.

    Calls `before_replace` with the temporary path between the two. If `path` is a symbolic link, its target is replaced
    and the link stays. If the block raises, removes the temporary file and leaves `path` unchanged. Raises an OSError
    of the block as StorageError that names `path`. Blocks until the disk has the bytes.
    """
    target = _regular_target(path)
    temporary = hidden_name(target)
    try:
        temporary.touch(exist_ok=False)
        yield temporary
        os.truncate(temporary, temporary.stat().st_size)  # frees what `reserve` allocated beyond the end
        _sync(temporary)
        before_replace(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_output(
    path: str | Path,
    *,
    inputs: Iterable[str | Path],
    replaceable: Callable[[Path], bool] = lambda _: False,
    force: bool = False,
) -> None:
    """Raise StorageError if `atomic(path)` would fail, or would replace a file that it must not.

    Refused are one of `inputs` or a file in it if it is a folder, by any name (see `refuse_same_file`), and, unless
    `force`, an existing file that is not empty and not `replaceable(path)`. Makes and removes a file beside `path`.
    """
    refuse_same_file(path, inputs)
    target = _regular_target(path)
    if not force and target.exists() and target.stat().st_size and not replaceable(target):
        raise StorageError(f"{path}: exists; --force replaces it")
    trial = hidden_name(target)
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def refuse_same_file(output: str | Path, inputs: Iterable[str | Path]) -> None:
    """Raise StorageError if `output` is one of `inputs`, or is or lies in an entry of one that is a folder.

    Files are compared by device and inode, so that hard and symbolic links make no difference.
    """
    target = _resolved(output)
    for path in inputs:
        if any(_is_same(target, one) for one in (path, *_entries(path))):
            raise StorageError(f"{output}: is the same file as the input {path}; choose another output")
        if any(_is_same(parent, path) for parent in target.parents):
            raise StorageError(f"{output}: lies in the input {path}; choose another output")


def is_in_place(file: int, path: Path) -> bool:
    """Whether `path` still names the open file of this descriptor: it was not removed or replaced since."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _regular_target(path: str | Path) -> Path:
    """The path behind all symbolic links; raises StorageError if there is something other than a regular file."""
    target = _resolved(path)
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise StorageError(f"{path}: exists and is not a regular file, choose another name")
    return target


def _resolved(path: str | Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:
        raise StorageError(f"{str(path)!r}: cannot be the name of a file: {error}") from error


def _entries(path: str | Path) -> list[Path]:
    with suppress(OSError, ValueError):
        return list(Path(path).iterdir())
    return []


def _is_same(one: str | Path, other: str | Path) -> bool:
    try:
        return Path(one).samefile(other)
    except (OSError, ValueError):
        return False


def digest_file(path: str | Path) -> str:
    """BLAKE2b digest (hex) of a file's content; raises NoInputError if it cannot be read."""
    try:
        with open_input(path) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror or error}") from error


def hidden_name(target: Path) -> Path:
    """A new hidden name beside `target` for a temporary file or folder; `remove_hidden` removes it."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")


def remove_hidden(target: str | Path) -> None:
    """Remove hidden files that a killed process left beside `target`; the caller must be its only writer."""
    target = _resolved(target)
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


def file_state(path: str | Path) -> tuple[int, ...]:
    """Numbers that change with the contents of a file; none if there is no such file."""
    try:
        found = Path(path).stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
