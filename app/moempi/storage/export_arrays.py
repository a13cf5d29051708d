"""Export of results as arrays: Parquet, NumPy's npz and safetensors, a request at a time."""

import json
import struct
import zipfile
from collections.abc import Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moempi.errors import ConfigError, DataError
from moempi.storage.files import atomic
from moempi.storage.reader import Results

_SAFETENSORS = {"f4": "F32", "f2": "F16", "i4": "I32", "i2": "I16", "f8": "F64", "i8": "I64"}
_HEADER_BYTES = 100_000_000
"""The longest header that the reference implementation of safetensors reads."""
_IDS = "ids"
_GROUP_BYTES = 16 << 20
_ROW_BYTES = 1024
"""Memory of a row beside its texts and arrays."""


def export_npz(results_path: str | Path, out: str | Path) -> int:
    """Write `<index>.<name>` for each array of each request, and the ids; returns the number of requests.

    `ids` uint8 are the ids in UTF-8, of request i the bytes `ids_offsets[i]` to `ids_offsets[i + 1] - 1`. Memory holds
    all ids, and the arrays of one request. Raises NoInputError, DataError or StorageError.
    """
    with Results(results_path) as results, atomic(out) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, values in chain(_named(results), _encoded(results.ids)):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.ascontiguousarray(values), allow_pickle=False)
        return len(results)


def export_safetensors(results_path: str | Path, out: str | Path) -> int:
    """Write `<index>.<name>` for each array of each request, and the ids as metadata; the number of requests.

    Reads the results twice, first for the sizes, which come first in the file. Memory holds the header, at most
    _HEADER_BYTES, and the arrays of one request. Raises DataError if the header is longer.
    """
    with Results(results_path) as results, atomic(out) as temporary:
        header = _header(results)
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for _, values in _named(results):
                file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)
        return len(results)


def export_parquet(results_path: str | Path, out: str | Path) -> int:
    """Write a row for each request: its texts, and each array as a list, or as nested lists; the number of requests.

    Memory holds a row group, of about _GROUP_BYTES or one request. Raises ConfigError if pyarrow is not installed.
    """
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(f"{out}: Parquet needs pyarrow: bash jobs/setup.sh parquet") from None
    with Results(results_path) as results, atomic(out) as temporary:
        if not len(results):
            raise DataError(f"{results_path}: has no requests")
        writer = None
        try:
            for rows in _row_groups(results):
                table = arrow.table({name: _column(arrow, [row[name] for row in rows]) for name in rows[0]})
                writer = writer or parquet.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        return len(results)


def _named(results: Results) -> Iterator[tuple[str, NDArray[Any]]]:
    return ((f"{result.index}.{name}", values) for result in results for name, values in result.arrays())


def _encoded(ids: list[str]) -> Iterator[tuple[str, NDArray[Any]]]:
    """Texts as bytes and offsets: NumPy's arrays of texts are as wide as the longest, and drop a NUL at the end."""
    encoded = [name.encode() for name in ids]
    yield _IDS, np.frombuffer(b"".join(encoded), np.uint8)
    yield f"{_IDS}_offsets", np.cumsum([0, *map(len, encoded)], dtype=np.int64)


def _header(results: Results) -> bytes:
    """The header of a safetensors file: metadata, and type, shape and place of each array."""
    entries = [f'"__metadata__": {json.dumps({_IDS: json.dumps(results.ids)})}']
    num_bytes, end = len(entries[0]), 0
    for name, values in _named(results):
        start, end = end, end + values.nbytes
        dtype = _SAFETENSORS[values.dtype.str[1:]]
        entry = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, end]}
        entries.append(f"{json.dumps(name)}: {json.dumps(entry)}")
        num_bytes += len(entries[-1]) + 2
        if num_bytes > _HEADER_BYTES - 16:
            raise DataError(
                f"{results.path}: has more arrays than the header of a safetensors file names in "
                f"{_HEADER_BYTES:,} bytes; export it as npz or parquet"
            )
    header = f"{{{', '.join(entries)}}}".encode()
    return header + b" " * (-len(header) % 8)


def _row_groups(results: Results) -> Iterator[list[dict[str, Any]]]:
    """Yield the texts and arrays of requests that together have about _GROUP_BYTES."""
    rows: list[dict[str, Any]] = []
    num_bytes = 0
    for result in results:
        rows.append(dict(chain(result.texts(), result.arrays())))
        num_bytes += _ROW_BYTES + sum(getattr(value, "nbytes", len(value)) for value in rows[-1].values())
        if num_bytes >= _GROUP_BYTES:
            yield rows
            rows, num_bytes = [], 0
    if rows:
        yield rows


def _column(arrow: Any, values: list[Any]) -> Any:
    """A column of texts, or of arrays: a list in each row, of lists of fixed length for each further axis."""
    if isinstance(values[0], str):
        return arrow.array(values, arrow.string())
    joined = np.concatenate(values)
    column = arrow.array(joined.reshape(-1))
    for size in joined.shape[:0:-1]:
        column = arrow.FixedSizeListArray.from_arrays(column, size)
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    return arrow.ListArray.from_arrays(offsets, column)
