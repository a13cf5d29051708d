"""Prompts in a column of a table, CSV or Parquet, as rows with the keys of a prompt line."""

import csv
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from moempi.errors import ConfigError, DataError

DEFAULT_COLUMN = "prompt"
ALSO_READ = ("id", "reference")
"""Columns that mean what the keys of a prompt line with these names mean."""

_BATCH_ROWS = 1024
_MAX_COLUMNS = 100_000

Row = dict[str, Any]


def csv_rows(lines: Iterable[bytes], *, path: str | Path, column: str, limit: int) -> Iterator[Row]:
    """Yield the rows of a CSV file given by its lines without their ends; an empty `id` or `reference` is left out.

    Bytes that are not UTF-8 become half surrogates. Raises DataError if the file has no such column, or is not CSV: a
    field may have `limit` characters.
    """
    earlier = csv.field_size_limit(limit)
    reader = csv.reader(line.decode("utf-8", "surrogateescape") + "\n" for line in lines)
    try:
        wanted = _wanted(next(reader, []), path=path, column=column)
        for cells in reader:
            if cells:
                row = {key: cells[at] for key, at in wanted.items() if at < len(cells)}
                yield {key: cell for key, cell in row.items() if cell or key not in ALSO_READ}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: is not CSV: {error}") from error
    finally:
        csv.field_size_limit(earlier)


def parquet_rows(path: str | Path, *, column: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file, a few in memory at a time; a column of lists of integers holds tokens.

    Raises DataError if the file is damaged or has no such column, ConfigError if pyarrow is not installed.
    """
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(f"{path}: Parquet needs pyarrow: bash jobs/setup.sh parquet") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            wanted = _wanted(names, path=path, column=column)
            columns = [names[at] for at in wanted.values()]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                for cells in batch.to_pylist():
                    yield _parquet_row({key: cells[names[at]] for key, at in wanted.items()})
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from error


def _parquet_row(row: Row) -> Row:
    present = {key: cell for key, cell in row.items() if cell is not None and not (cell == "" and key in ALSO_READ)}
    if isinstance(present.get("prompt"), list):
        present["tokens"] = present.pop("prompt")
    return present


def _wanted(names: list[str], *, path: str | Path, column: str) -> dict[str, int]:
    """The number of the column of each key."""
    wanted = column or DEFAULT_COLUMN
    if wanted not in names:
        known = ", ".join(name[:40] for name in names[:20])
        raise DataError(f"{path}: has no column {wanted[:40]!r} but {known or 'none'}; name one as input.column")
    return {"prompt": names.index(wanted)} | {name: names.index(name) for name in ALSO_READ if name in names}
