"""C kernels, compiled on first use with the C compiler (`CC`, else `cc`) and kept in the user's cache folder.

The name of a kept library (see kept_files.py) holds a hash of the sources and their flags, the machine and the
compiler. It is loaded from a copy in memory, because another process may cut or replace the file later.
"""

import ctypes
import fcntl
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import xxhash

from moempi.backend.kept_files import keep, kept_folder, read_kept, warn_once

COMPILE_LIMIT_S = 240.0
"""It takes some 15 s of a core, which other work may share. Ranks that wait for it end after `run.timeout_s`, 300 s."""
POLL_S = 0.05
RETRY_S = 24 * 3600.0
"""How long a compiler that did not end is not started again."""

log = logging.getLogger(__name__)


class _CompilerError(Exception):
    """No library can be compiled; the message is the reason."""


def load_kernel(source: Path, *flags: Sequence[str]) -> ctypes.CDLL | None:
    """Load the library of one C file, or of a folder of them, compiled on first use.

    It is compiled with the first of several sets of flags that the compiler takes. Not collective; blocks for up to 2
    COMPILE_LIMIT_S for each set. Returns None if the library cannot be compiled or loaded, and logs a warning with the
    reason. Raises OSError if `source` cannot be read: the package is damaged, and the fallback must not hide it.
    """
    read = sorted(source.iterdir()) if source.is_dir() else [source]
    contents, names = [path.read_bytes() for path in read], [str(path) for path in read if path.suffix == ".c"]
    problems = []
    for options in flags or ((),):
        code = b"\n".join([*contents, *(option.encode() for option in options)])
        try:
            library = _kept_or_compiled(source, code, [*options, *names])
        except (_CompilerError, OSError) as error:
            problems.append(" ".join(str(error).split()))
        else:
            for problem in problems:
                log.info("compiled with other instructions: %s", problem)
            return library
    warn_once(f"compiled kernels are off, the run is slower: {problems[0]}")
    return None


def _kept_or_compiled(source: Path, code: bytes, arguments: list[str]) -> ctypes.CDLL:
    """The kept library, else one compiled with these arguments, which is kept; several ranks may do so at once."""
    trusted = {os.geteuid(), source.stat().st_uid}
    folder = kept_folder(trusted)
    begin = f"{source.stem}-{xxhash.xxh3_64_hexdigest(code)}-{platform.machine()}"
    try:
        compiler = _compiler(folder)
        identity = _identity(compiler)
    except _CompilerError:
        library = _load_kept(folder, f"{begin}-*.so", trusted)  # one of any compiler, if none can be started
        if library is None:
            raise
        return library
    name = f"{begin}-{identity}.so"
    library = _load_kept(folder, name, trusted)
    if library is None:
        with _alone(folder):
            library = _load_kept(folder, name, trusted)  # another process may have compiled it meanwhile
            if library is None:
                content = _compile(_compiler(folder), source, arguments, folder)
                library = _load(content, source.stem)
                if folder:
                    keep(content, folder / name)
    return library


@contextmanager
def _alone(folder: Path | None) -> Iterator[None]:
    """Hold the lock of the folder of kept files, so that one rank of a node compiles; wait COMPILE_LIMIT_S at most."""
    if folder is None:
        yield
        return
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        end = time.monotonic() + COMPILE_LIMIT_S
        while time.monotonic() < end:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(POLL_S)
            except OSError:  # a file system without locks
                break
            else:
                break
        yield
    finally:
        os.close(lock)


def _load_kept(folder: Path | None, pattern: str, trusted: set[int]) -> ctypes.CDLL | None:
    """The first kept library of a name that is whole, trusted and loadable; None if there is none."""
    for path in sorted(folder.glob(pattern)) if folder else ():
        content = read_kept(path, trusted)
        if content is not None:
            try:
                return _load(content, path.stem)
            except OSError as error:
                log.info("%s: not loaded: %s", path, error)
    return None


def _load(library: bytes, name: str) -> ctypes.CDLL:
    """Load a library from memory; raises OSError."""
    # The descriptor stays open: the loader identifies a library by its path, and a second one needs another number.
    descriptor = os.memfd_create(name)
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(library)
    try:
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except OSError:
        os.close(descriptor)
        raise


def _compiler(folder: Path | None) -> list[str]:
    """The words of the compiler's command; raises _CompilerError if there is none or it did not end lately."""
    compiler = (os.environ.get("CC") or shutil.which("cc") or "").split()
    if not compiler:
        raise _CompilerError("there is no C compiler (cc, or set CC)")
    if compiler[0] in _unending():
        raise _CompilerError(_unending_text(compiler))
    with suppress(OSError):
        if abs(time.time() - _marker(compiler, folder).stat().st_mtime) < RETRY_S:
            raise _CompilerError(_unending_text(compiler))
    return compiler


def _identity(compiler: list[str]) -> str:
    """A hash of the compiler's command and program, and of the processor's features if the code depends on them.

    The program is not started: its size and time tell versions apart, and every rank comes here. Raises
    _CompilerError if there is no such program.
    """
    program = shutil.which(compiler[0])
    if program is None:
        raise _CompilerError(f"{compiler[0]} cannot be started: there is no such program")
    found = os.stat(program)  # noqa: PTH116
    features = ""
    if any("=native" in word for word in compiler):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = (*compiler, program, str(found.st_size), str(found.st_mtime_ns), features)
    return xxhash.xxh3_64_hexdigest(os.fsencode("\n".join(parts)))


def _compile(compiler: list[str], source: Path, arguments: list[str], folder: Path | None) -> bytes:
    with tempfile.TemporaryDirectory(prefix="moempi-") as build:
        made = Path(build) / "kernel.so"
        optimization = [] if any(word.startswith("-O") for word in compiler) else ["-O3"]
        options = [*optimization, "-shared", "-fPIC", "-o", str(made), *arguments, "-lm"]
        output = _run([*compiler, *options], compiler, folder)
        if not made.is_file():
            raise _CompilerError(f"{compiler[0]} does not compile {source.name}: {output.strip()[:200]}")
        return made.read_bytes()


def _run(command: list[str], compiler: list[str], folder: Path | None) -> str:
    """Run a command of the compiler and return its output; ends it with its children after COMPILE_LIMIT_S.

    Raises _CompilerError if the command cannot be started or does not end.
    """
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise _CompilerError(f"{compiler[0]} cannot be started: {error.strerror}") from error
        try:
            process.wait(COMPILE_LIMIT_S)
        except subprocess.TimeoutExpired:
            _unending().add(compiler[0])
            with suppress(OSError):
                _marker(compiler, folder).touch(mode=0o600)
            raise _CompilerError(_unending_text(compiler)) from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return output.read(1 << 16).decode(errors="replace")


@cache
def _unending() -> set[str]:
    """The compilers that did not end in this process; `_marker` is for the processes after it."""
    return set()


def _marker(compiler: list[str], folder: Path | None) -> Path:
    """The file that is made if a compiler does not end; no file if there is no folder."""
    return (folder or Path("/dev/null")) / f"{xxhash.xxh3_64_hexdigest(os.fsencode(' '.join(compiler)))}.unending"


def _unending_text(compiler: list[str]) -> str:
    return f"{compiler[0]} did not end within {COMPILE_LIMIT_S:g} s; it is started again after a day"
