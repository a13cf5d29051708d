"""Small C kernels, compiled on first use with the C compiler (`CC`, else `cc`) into the user's cache folder."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import xxhash

COMPILE_LIMIT_S = 60


def load_kernel(source: Path) -> ctypes.CDLL | None:
    """Load the library of one C file, compiled on first use. Not collective.

    Returns None if the library cannot be compiled or loaded. Raises OSError if `source` cannot be read: the package is
    damaged, and the fallback must not hide it.
    """
    code = source.read_bytes()
    try:
        return ctypes.CDLL(str(_compiled(source, code)))
    except (OSError, subprocess.SubprocessError):
        return None


def _compiled(source: Path, code: bytes) -> Path:
    """Compile the library and return its path; several ranks may do so at once. Raises OSError or SubprocessError."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "moempi"
    library = folder / f"{source.stem}-{xxhash.xxh3_64_hexdigest(code)}.so"
    if not library.exists():
        compiler = os.environ.get("CC") or shutil.which("cc")
        if not compiler:
            raise FileNotFoundError("no C compiler")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as build:
            made = Path(build) / library.name
            command = [*compiler.split(), "-O3", "-shared", "-fPIC", "-o", str(made), str(source)]
            subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_LIMIT_S)
            made.replace(library)
    return library
