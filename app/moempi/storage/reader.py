"""Results for Python: `Results(path)` opens a results file, and reads of each request what is asked for, as arrays."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moempi.arrays import Float32Array, Int32Array
from moempi.errors import DataError
from moempi.storage.closeable import Closeable
from moempi.storage.hdf5 import raising_data_errors, walk
from moempi.storage.results import Ragged, ResultFile, typed_dataset
from moempi.storage.results_layout import ARRAYS, TRACES, missing_value

NOT_RECORDED = -1
"""What `Result.routing` has where no expert was recorded."""
TRAINER_DTYPE = np.int16


class Results(Closeable):
    """The results file `path`, opened lazily: `results["id"]` or `results[0]` is a `Result`; iteration is in order.

    `hidden_layers` and `routed_layers` are the layers whose hidden states and routing are recorded. Raises NoInputError
    or DataError as `ResultFile` does; so does reading.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._file = ResultFile(path)
        try:
            names = dict(walk(self._file.hdf5))
            self.hidden_layers = self._layers("hidden") if "hidden" in names else ()
            self.routed_layers = self._layers("routing") if "routing" in names else ()
            self._names = frozenset(names)
        except BaseException:
            self._file.close()
            raise
        self._opened: dict[str, Ragged] = {}

    def __len__(self) -> int:
        return self._file.num_requests

    def __iter__(self) -> "Iterator[Result]":
        return (self[index] for index in range(len(self)))

    def __getitem__(self, request: str | int) -> "Result":
        """The result of a request by its id, or by its index from 0; raises KeyError or IndexError."""
        index = self._indices[request] if isinstance(request, str) else range(len(self))[request]
        return Result(self, index)

    @property
    def ids(self) -> list[str]:
        """The ids of all requests, in order."""
        return list(self._indices)

    def text(self, name: str, index: int) -> str:
        """A text of a request, "" if there is none."""
        column = self._file.ragged(name)
        if column is None:
            return ""
        with raising_data_errors(self.path, f"{name} of request {index}"):
            return bytes(column.read(index, index + 1)[0]).decode()

    def array(self, name: str, index: int) -> NDArray[Any] | None:
        """An array of a request by its name in `records.RequestRecord`; None if the file has none."""
        column = self._file.ragged(name)
        return None if column is None else self._read(column, name, index)

    def rows(self, table: str, path: str, num_dims: int, index: int) -> NDArray[Any] | None:
        """The rows of a request in the dataset `path` of a table; None if the file has none."""
        if path not in self._names:
            return None
        if path not in self._opened:
            columns = TRACES[table].values()
            dtypes = next((column.dtypes for column in columns if column.path == path), (np.float32,))
            self._opened[path] = Ragged(self._file.hdf5, f"{table}/offsets", path, dtypes, num_dims)
            if self._opened[path].num_requests != len(self):
                raise DataError(f"{self.path}: {table}/offsets: is not of {len(self)} requests")
        return self._read(self._opened[path], path, index)

    def first_hidden(self, index: int) -> int:
        """The position of the first recorded hidden state of a request."""
        with raising_data_errors(self.path, "hidden/first"):
            return int(typed_dataset(self._file.hdf5, "hidden/first", np.int32, 1)[index])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {self.text("id", index): index for index in range(len(self))}

    def _layers(self, table: str) -> tuple[int, ...]:
        layers: list[int] = typed_dataset(self._file.hdf5, f"{table}/layer", np.int32, 1)[:].tolist()
        return tuple(layers)

    def _read(self, column: Ragged, name: str, index: int) -> NDArray[Any]:
        with raising_data_errors(self.path, f"{name} of request {index}"):
            return column.read(index, index + 1)[0]


class Result:
    """The result of one request; each property is read from the file when it is asked for.

    Of n prompt tokens and m generated tokens: `prompt` (n,), `tokens` (m,), `logprobs` (m,), `top_tokens` and
    `top_logprobs` (m, k), `score` (n,), `score_top_tokens` and `score_top_logprobs` (n, k). What was not recorded is
    empty.
    """

    def __init__(self, results: Results, index: int) -> None:
        self.index = index
        self._results = results

    def __getattr__(self, name: str) -> Any:
        """A text, or an array of ARRAYS, by the name of its column."""
        if name in ("id", "finish", "error", "reference", "prompt_id", "metadata", "group", "text"):
            return self._results.text(name, self.index)
        if name in ARRAYS:
            found = self._results.array(name, self.index)
            return np.zeros((0,) * len(ARRAYS[name].dims), ARRAYS[name].dtype) if found is None else found
        raise AttributeError(f"a result has no {name}")

    def hidden(self, layer: int) -> Float32Array:
        """The recorded hidden states behind a layer (h, D), in float32; raises KeyError if it is not recorded."""
        if layer not in self._results.hidden_layers:
            recorded = ", ".join(map(str, self._results.hidden_layers)) or "none"
            raise KeyError(f"hidden states of layer {layer} are not recorded; recorded layers: {recorded}")
        rows = self._results.rows("hidden", f"hidden/values/{layer:03}", 2, self.index)
        return np.zeros((0, 0), np.float32) if rows is None else rows

    @property
    def hidden_positions(self) -> Int32Array:
        """The positions (h,) of the rows of `hidden`: prompt tokens are 0 to n - 1, generated ones follow."""
        layers = self._results.hidden_layers
        first = self._results.first_hidden(self.index) if layers else 0
        return first + np.arange(len(self.hidden(layers[0])) if layers else 0, dtype=np.int32)

    @property
    def experts(self) -> NDArray[Any] | None:
        """The chosen experts (t, L, K) of the computed positions; None if they are not recorded."""
        return self._results.rows("routing", "routing/experts", 3, self.index)

    @property
    def routing_weights(self) -> Float32Array | None:
        """The weights (t, L, K) of the chosen experts; None if they are not recorded."""
        return self._results.rows("routing", "routing/weights", 3, self.index)

    @property
    def routing(self) -> NDArray[np.int16] | None:
        """The chosen experts as trainers take them: int16 (n + m - 1, L, K), NOT_RECORDED where there are none.

        None if the file has no routing; raises DataError if an expert does not fit.
        """
        experts = self.experts
        if experts is None:
            return None
        known = (experts != missing_value(experts.dtype)).any(axis=2)
        most = np.iinfo(TRAINER_DTYPE).max
        if known.any() and experts[known].max() > most:
            raise DataError(f"{self._results.path}: an expert beyond {most} does not fit {np.dtype(TRAINER_DTYPE)}")
        positions = max(len(self.prompt) + len(self.tokens) - 1, 0)
        routing = np.full((max(positions, len(experts)), *experts.shape[1:]), NOT_RECORDED, TRAINER_DTYPE)
        routing[: len(experts)][known] = experts[known]
        return routing

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield name and values of all arrays that the file has of this request, one in memory at a time."""
        for name in ARRAYS:
            if (found := self._results.array(name, self.index)) is not None:
                yield name, found
        for name in ("routing", "routing_weights"):
            if (found := getattr(self, name)) is not None:
                yield name, found
        for layer in self._results.hidden_layers:
            yield f"hidden.{layer}", self.hidden(layer)
