"""Export of results as arrays: Parquet, NumPy's npz and safetensors, a request at a time."""

import json
import struct
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moempi.errors import ConfigError, DataError
from moempi.storage.files import atomic
from moempi.storage.reader import Results

_SAFETENSORS = {"f4": "F32", "f2": "F16", "i4": "I32", "i2": "I16", "f8": "F64", "i8": "I64"}
_IDS = "ids"
_TEXTS = ("id", "finish", "error", "text", "reference")


def export_npz(results_path: str | Path, out: str | Path) -> int:
    """Write `<index>.<name>` for each array of each request, and `ids` (N,); returns the number of requests.

    Memory holds the arrays of one request. Raises NoInputError, DataError or StorageError.
    """
    with Results(results_path) as results, atomic(out) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, values in (*_named(results), (_IDS, _encoded(results.ids))):
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, np.ascontiguousarray(values), allow_pickle=False)
        return len(results)


def export_safetensors(results_path: str | Path, out: str | Path) -> int:
    """Write `<index>.<name>` for each array of each request, and the ids as metadata; the number of requests.

    Reads the results twice, first for the sizes, which come first in the file. Memory holds the arrays of one request.
    """
    with Results(results_path) as results, atomic(out) as temporary:
        entries: dict[str, Any] = {"__metadata__": {_IDS: json.dumps(results.ids)}}
        end = 0
        for name, values in _named(results):
            start, end = end, end + values.nbytes
            dtype = _SAFETENSORS[values.dtype.str[1:]]
            entries[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, end]}
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for _, values in _named(results):
                file.write(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data)
        return len(results)


def export_parquet(results_path: str | Path, out: str | Path) -> int:
    """Write a row for each request: its texts, and each array as a list, or as nested lists; the number of requests.

    Memory holds the arrays of one request. Raises ConfigError if pyarrow is not installed.
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
            for result in results:
                columns = {name: arrow.array([getattr(result, name)]) for name in _TEXTS}
                columns |= {name: _nested(arrow, values) for name, values in result.arrays()}
                table = arrow.table(columns)
                writer = writer or parquet.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        return len(results)


def _named(results: Results) -> Iterator[tuple[str, NDArray[Any]]]:
    return ((f"{result.index}.{name}", values) for result in results for name, values in result.arrays())


def _encoded(ids: list[str]) -> NDArray[Any]:
    """Texts as NumPy's; an array of them drops a NUL at the end."""
    return np.array(ids, np.str_)


def _nested(arrow: Any, values: NDArray[Any]) -> Any:
    """One row that holds the values: a list, of lists of fixed length for each further axis."""
    flat = arrow.array(np.ascontiguousarray(values).reshape(-1))
    for size in values.shape[:0:-1]:
        flat = arrow.FixedSizeListArray.from_arrays(flat, size)
    return arrow.ListArray.from_arrays(arrow.array([0, len(values)], arrow.int32()), flat)
