"""The form of a prompt file, found by its content and its name, and the bytes behind its compression."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile, GzipFile
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import msgspec
from msgspec import Struct

from moempi.config.input_file import open_input
from moempi.config.reading import HDF5_BEGIN
from moempi.errors import ConfigError, DataError, NoInputError

Name = Literal["jsonl", "openai", "text", "csv", "parquet", "hdf5"]
Compression = Literal["", "gzip", "zstd"]

STDIN_COPY = "stdin"
"""The name of the file that holds the prompts of stdin: it has no ending that says its form."""

_TITLES: dict[Name, str] = {
    "jsonl": "JSON lines",
    "openai": "OpenAI batch",
    "text": "plain text, one prompt a line",
    "csv": "CSV",
    "parquet": "Parquet",
    "hdf5": "token arrays (HDF5)",
}
_COMPRESSIONS: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_BINARY: dict[bytes, Name] = {HDF5_BEGIN: "hdf5", b"PAR1": "parquet"}
_OPENAI_KEYS = {"custom_id", "body"}
_HEAD_BYTES = 1 << 20


class PromptForm(Struct, frozen=True):
    """How a file holds prompts, and its compression, "" for none."""

    name: Name
    compression: Compression = ""

    def __str__(self) -> str:
        return _TITLES[self.name] + (f", {self.compression}" if self.compression else "")


def find_form(path: str | Path, *, column: str = "") -> PromptForm:
    """The form of a prompt file: HDF5 and Parquet by content, CSV and text by name, OpenAI batch by its first object.

    A `column` makes any other file CSV. A text file that begins with JSON objects is JSON lines. Raises NoInputError if
    the file cannot be read, DataError if its compression is damaged or holds HDF5 or Parquet.
    """
    with open_decompressed(path, "") as file:
        head = file.read(8)
    found: list[Compression] = [kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)]
    compression = found[0] if found else ""
    with open_decompressed(path, compression) as file:
        head = file.read(_HEAD_BYTES)
    binary = next((name for magic, name in _BINARY.items() if head.startswith(magic)), None)
    if binary and compression:
        raise DataError(f"{path}: is {_TITLES[binary]} inside {compression}; decompress it first")
    return PromptForm(binary or _text_form(_bare_name(path), head, column), compression)


@contextmanager
def open_decompressed(path: str | Path, compression: Compression) -> Iterator[BinaryIO]:
    """Open a file to read the bytes behind its compression, a few at a time, however many there are.

    Raises NoInputError if it cannot be read, DataError if it is damaged or cut off, ConfigError if Python lacks zstd.
    """
    zstd = _zstd(path) if compression == "zstd" else None
    damage = (EOFError, BadGzipFile, zlib.error, *([] if zstd is None else [zstd.ZstdError]))
    try:
        with open_input(path) as file:
            if compression == "gzip":
                with GzipFile(fileobj=file) as decompressed:
                    yield cast("BinaryIO", decompressed)
            elif zstd is not None:
                with zstd.ZstdFile(file) as decompressed:
                    yield decompressed
            else:
                yield file
    except damage as error:
        raise DataError(f"{path}: its compression is damaged: {error}") from error
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _zstd(path: str | Path) -> Any:
    """The module of zstd, in Python since 3.14 and before that a package of the extra `zstd`."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ConfigError(f"{path}: this Python reads no zstd; pip install backports.zstd, or decompress the file")


def _bare_name(path: str | Path) -> Path:
    name = Path(path)
    return name.with_suffix("") if name.suffix in (".gz", ".zst") else name


def _text_form(name: Path, head: bytes, column: str) -> Name:
    if column or name.suffix == ".csv":
        return "csv"
    first = _first_object(head)
    if first >= _OPENAI_KEYS:
        return "openai"
    return "text" if (name.suffix == ".txt" or name.name == STDIN_COPY) and not first else "jsonl"


def _first_object(head: bytes) -> set[str]:
    """The keys of the first line that is a JSON object, if it is among the first lines that are not blank."""
    for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        try:
            return set(msgspec.json.decode(line, type=dict[str, msgspec.Raw]))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
    return set()
