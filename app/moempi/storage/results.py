"""Reading a results file: its requests in input order, checked as `hdf5` describes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from moempi.errors import DataError
from moempi.storage.closeable import Closeable
from moempi.storage.hdf5 import has_format, open_dataset, open_file, raising_data_errors, read_attribute, walk
from moempi.storage.records import RequestRecord, Scores
from moempi.storage.results_layout import (
    ARRAYS,
    FORMAT,
    NO_TOKEN,
    OFFSETS,
    OPTIONAL_TEXTS,
    SECONDS,
    TEXTS,
    VERSION,
    blocks,
)

NOT_PHASES = ("rank", "host", "steps", "tokens")


def is_results_file(path: Path) -> bool:
    """Whether the file at `path` says that it is a results file, of any version."""
    return has_format(path, FORMAT)


class ResultFile(Closeable):
    """A results file opened for reading.

    Raises NoInputError if it cannot be read and DataError if it is not a results file of layout 1.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._file = open_file(path)
        try:
            found = read_attribute(self._file, "format"), read_attribute(self._file, "version")
            if found != (FORMAT, VERSION):
                raise DataError(f"{path}: not a results file of layout {VERSION}: it says {found[0]}, {found[1]}")
            self._columns = self._open_columns()
            counts = {column.num_requests for column in self._columns.values()}
            if not self._columns.keys() >= {"id", "finish", "text"} or len(counts) != 1:
                raise DataError(f"{path}: its columns are missing or disagree about the number of requests")
            self.num_requests = counts.pop()
        except BaseException:
            self._file.close()
            raise

    def requests(self) -> Iterator[RequestRecord]:
        """Yield the requests in input order, a few MiB in memory at a time; raises DataError if the file is damaged."""
        num_bytes = sum(
            (column.num_bytes() for column in self._columns.values()), np.zeros(self.num_requests, np.int64)
        )
        for start, stop in blocks(num_bytes):
            with raising_data_errors(self.path, f"requests {start} to {stop - 1}"):
                columns = {name: column.read(start, stop) for name, column in self._columns.items()}
                records = [
                    _record(start + i, {name: rows[i] for name, rows in columns.items()}) for i in range(stop - start)
                ]
            yield from records

    def attribute(self, name: str) -> str | int | float | None:
        """An attribute of the file, None if it is absent. Raises DataError."""
        return read_attribute(self._file, name)

    def errors(self, *, limit: int) -> list[tuple[str, str]]:
        """Id and error of the first `limit` requests that ended with an error. Raises DataError."""
        error, name = self.ragged("error"), self.ragged("id")
        if error is None or name is None:
            return []
        with raising_data_errors(self.path, "requests/error"):
            failed = np.flatnonzero(error.num_bytes())[:limit].tolist()
            return [(_text(name.read(i, i + 1)[0]), _text(error.read(i, i + 1)[0])) for i in failed]

    def num_errors(self) -> int:
        """Number of requests that ended with an error."""
        error = self.ragged("error")
        return 0 if error is None else int(np.count_nonzero(error.num_bytes()))

    def scores(self) -> Scores | None:
        """The scores of all tokens, of which a few MiB are in memory; None if nothing was scored. Raises DataError."""
        column = self.ragged("score")
        if column is None:
            return None
        with raising_data_errors(self.path, "score/logprobs"):
            parts = (column.read(start, stop) for start, stop in blocks(column.num_bytes()))
            return sum((Scores.of(np.concatenate(part)) for part in parts), Scores())

    def timing(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sum of the seconds of all phases, and steps, per rank and attempt (R,). Raises DataError."""
        names = [name for name, _ in walk(self._file) if name.startswith("timing/")]
        phases = [name for name in names if name.split("/")[1] not in NOT_PHASES]
        seconds = [typed_dataset(self._file, name, np.dtype(np.float64), 1)[:] for name in phases]
        return np.sum(seconds, axis=0), typed_dataset(self._file, "timing/steps", np.dtype(np.int64), 1)[:]

    def sent_bytes(self, level: str) -> NDArray[np.int64]:
        """Bytes of rows that each rank sent over links of a level, per rank and attempt (R,). Raises DataError."""
        num_bytes: NDArray[np.int64] = typed_dataset(self._file, f"network/{level}_bytes", np.dtype(np.int64), 1)[:]
        return num_bytes

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def hdf5(self) -> Any:
        """The open h5py.File."""
        return self._file

    def ragged(self, name: str) -> "Ragged | None":
        """The column of a field of RequestRecord; None if the file has none."""
        column = self._columns.get(name)
        return column if isinstance(column, Ragged) else None

    def _open_columns(self) -> "dict[str, Ragged | _Seconds]":
        present = dict(walk(self._file))
        columns: dict[str, Ragged | _Seconds] = {}
        for name, kind in ARRAYS.items():
            if kind.path in present:
                offsets = OFFSETS[kind.dims[0]]
                dtypes = (kind.dtype, np.float16) if name == "score_top_logprobs" else kind.dtype
                columns[name] = Ragged(self._file, offsets, kind.path, dtypes, len(kind.dims))
        for name, text in TEXTS.items():
            if text.exact in present:
                columns[name] = Ragged(
                    self._file, f"{text.exact}/offsets", f"{text.exact}/values", np.dtype(np.uint8), 1
                )
        for name, duration in SECONDS.items():
            if duration.path in present:
                columns[name] = _Seconds(self._file, duration.path)
        return columns


class Ragged:
    """A dataset with a varying number of rows per request, and the offsets of each request's rows."""

    def __init__(self, file: Any, offsets: str, values: str, dtype: Any, num_dims: int) -> None:
        self._values = typed_dataset(file, values, dtype, num_dims)
        self.offsets = typed_dataset(file, offsets, np.dtype(np.int64), 1)[:]
        starts_and_ends = len(self.offsets) > 0 and self.offsets[0] == 0 and self.offsets[-1] == len(self._values)
        if not starts_and_ends or (np.diff(self.offsets) < 0).any():
            raise DataError(f"{file.filename}: {offsets}: do not divide the {len(self._values)} rows of {values}")
        self.num_requests = len(self.offsets) - 1

    def num_bytes(self) -> NDArray[np.int64]:
        """Bytes of each request (N,)."""
        row_bytes = self._values.dtype.itemsize * int(np.prod(self._values.shape[1:]))
        num_bytes: NDArray[np.int64] = np.diff(self.offsets) * row_bytes
        return num_bytes

    def read(self, start: int, stop: int) -> list[NDArray[Any]]:
        """The rows of each request in [start, stop)."""
        bounds = self.offsets[start : stop + 1]
        rows = self._values[bounds[0] : bounds[-1]]
        rows = rows.astype(np.float32) if rows.dtype == np.float16 else rows
        return np.split(rows, bounds[1:-1] - bounds[0])


class _Seconds:
    """A dataset with one duration per request; None where it is no duration."""

    def __init__(self, file: Any, path: str) -> None:
        self._values = typed_dataset(file, path, np.dtype(np.float64), 1)
        self.num_requests = len(self._values)

    def num_bytes(self) -> NDArray[np.int64]:
        """Bytes of each request (N,)."""
        return np.full(self.num_requests, self._values.dtype.itemsize)

    def read(self, start: int, stop: int) -> Any:
        """The duration of each request in [start, stop), a float or None."""
        return [second if second >= 0 else None for second in self._values[start:stop].tolist()]


def typed_dataset(file: Any, path: str, dtype: Any, num_dims: int) -> Any:
    """The dataset `path` of a type `dtype`, or one of several, with `num_dims` axes; DataError if it is another."""
    dataset = h5py.Dataset(open_dataset(file, path))
    with raising_data_errors(file.filename, path):  # a damaged type may have no equal in NumPy
        found = dataset.dtype
    allowed = [np.dtype(kind) for kind in (dtype if isinstance(dtype, tuple) else (dtype,))]
    if found not in allowed or dataset.ndim != num_dims:
        names = " or ".join(map(str, allowed))
        raise DataError(f"{file.filename}: {path}: is {found} {dataset.shape}, not {names} with {num_dims} axes")
    if len(dataset) and not dataset.size:  # rows of no bytes may be more than memory can count
        raise DataError(f"{file.filename}: {path}: is {dataset.shape}, rows without entries")
    return dataset


def _text(rows: NDArray[Any]) -> str:
    return rows.tobytes().decode()


def _record(index: int, columns: dict[str, Any]) -> RequestRecord:
    fields: dict[str, Any] = {}
    for name, rows in columns.items():
        fields[name] = _text(rows) if name in TEXTS else rows
    for tokens, logprobs in (("top_tokens", "top_logprobs"), ("score_top_tokens", "score_top_logprobs")):
        if tokens in fields:
            width = int((fields[tokens] != NO_TOKEN).any(axis=0).sum())
            for name in (tokens, logprobs):
                fields[name] = fields[name][:, :width] if width else fields[name][:0, :0]
    fields |= {name: fields.get(name) or None for name in OPTIONAL_TEXTS}
    return RequestRecord(index=index, **fields)
