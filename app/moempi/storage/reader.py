"""Results for Python: `Results(path)` opens a results file, and reads of each request what is asked for, as arrays."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moempi.arrays import Float32Array, Int32Array
from moempi.errors import DataError
from moempi.storage.closeable import Closeable
from moempi.storage.hdf5 import raising_data_errors, walk
from moempi.storage.results import Ragged, ResultFile, typed_dataset
from moempi.storage.results_layout import ABOVE_OFFSETS, ARRAYS, TEXTS, TRACES, blocks, missing_value

NOT_RECORDED = -1
"""What `Result.routing` has where no expert was recorded."""
TRAINER_DTYPE = np.int16


class Above(NamedTuple):
    """The tokens above a threshold at the positions of a prompt: at p `tokens[offsets[p] : offsets[p + 1]]`, ascending.

    `offsets` (n + 1,) int64, `tokens` (s,) int32, and their `logprobs` (s,) float32.
    """

    offsets: NDArray[np.int64]
    tokens: Int32Array
    logprobs: Float32Array


class Results(Closeable):
    """The results file `path`, opened lazily: `results["id"]` or `results[0]` is a `Result`; iteration is in order.

    `hidden_layers` and `routed_layers` are the layers whose hidden states and routing are recorded. Raises NoInputError
    or DataError as `ResultFile` does; so does reading.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._file = ResultFile(path)
        try:
            self._names = frozenset(name for name, is_group in walk(self._file.hdf5) if not is_group)
            self.hidden_layers = self._layers("hidden")
            self.routed_layers = self._layers("routing")
            if self.hidden_layers:
                self._first = self._typed("hidden/first", np.int32, 1)
            self._require_whole()
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

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all requests, in order."""
        column = self._file.ragged("id")
        if column is None:
            raise DataError(f"{self.path}: has no ids")
        with raising_data_errors(self.path, "ids"):
            parts = (column.read(start, stop) for start, stop in blocks(column.num_bytes()))
            return [value.tobytes().decode() for part in parts for value in part]

    def has_text(self, name: str) -> bool:
        """Whether the file has this text of its requests."""
        return self._file.ragged(name) is not None

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

    def above(self, index: int) -> Above | None:
        """The tokens above the threshold at the positions of a request; None if the file has none."""
        prompts = self._file.ragged("prompt")
        if ABOVE_OFFSETS not in self._names or prompts is None:
            return None
        offsets, tokens, logprobs = (
            self._typed(column.path, np.int64 if name == "counts" else column.dtypes, 1)
            for name, column in TRACES["above"].items()
        )
        first, last = prompts.offsets[index : index + 2].tolist()
        with raising_data_errors(self.path, f"{ABOVE_OFFSETS} of request {index}"):
            bounds = offsets[first : last + 1]
            fits = len(bounds) == last - first + 1 and (np.diff(bounds) >= 0).all() and len(tokens) == len(logprobs)
            if not fits or bounds[0] < 0 or bounds[-1] > len(tokens):
                raise DataError(f"{self.path}: {ABOVE_OFFSETS}: do not divide the {len(tokens)} values")
            own = slice(bounds[0], bounds[-1])
            return Above(bounds - bounds[0], tokens[own], logprobs[own].astype(np.float32))

    def routing(self, name: str, index: int) -> NDArray[Any] | None:
        """The rows (t, L, K) of a request in a column of the routing; None if the file has none."""
        path = f"routing/{name}"
        if path not in self._names:
            return None
        return self._read(self._table("routing", path, TRACES["routing"][name].dtypes, 3), path, index)

    def hidden(self, layer: int, index: int) -> Float32Array:
        """The recorded hidden states (h, D) of a request behind one of `hidden_layers`."""
        path = _states_path(layer)
        return self._read(self._table("hidden", path, np.float32, 2), path, index)

    def hidden_positions(self, index: int) -> Int32Array:
        """The positions (h,) of the recorded hidden states of a request."""
        if not self.hidden_layers:
            return np.zeros(0, np.int32)
        offsets = self._table("hidden", _states_path(self.hidden_layers[0]), np.float32, 2).offsets
        with raising_data_errors(self.path, "hidden/first"):
            first = int(self._first[index])
        return first + np.arange(offsets[index + 1] - offsets[index], dtype=np.int32)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.ids)}

    def _layers(self, table: str) -> tuple[int, ...]:
        """The layers of a table, () if the file has no such table."""
        if not any(name.startswith(f"{table}/") for name in self._names):
            return ()
        layers: tuple[int, ...] = tuple(self._typed(f"{table}/layer", np.int32, 1)[:].tolist())
        if list(layers) != sorted({layer for layer in layers if layer >= 0}):
            raise DataError(f"{self.path}: {table}/layer: does not ascend from 0 or above")
        return layers

    def _require_whole(self) -> None:
        """Raise DataError unless the tables have a dataset for each layer, and their shapes agree."""
        needed = [_states_path(layer) for layer in self.hidden_layers]
        needed += ["routing/experts"] if self.routed_layers else []
        if missing := sorted(set(needed) - self._names):
            raise DataError(f"{self.path}: {missing[0]}: is missing")
        if self.hidden_layers and len(self._first) != len(self):
            raise DataError(f"{self.path}: hidden/first: is of {len(self._first)} requests, not of {len(self)}")
        shapes = {
            path: self._typed(path, TRACES["routing"][name].dtypes, 3).shape
            for name in ("experts", "weights")
            if (path := f"routing/{name}") in self._names
        }
        for path, shape in shapes.items():
            if shape != shapes.get("routing/experts") or shape[1] != len(self.routed_layers):
                raise DataError(f"{self.path}: {path}: {shape} does not fit {len(self.routed_layers)} layers")

    def _table(self, table: str, path: str, dtypes: Any, num_dims: int) -> Ragged:
        """The dataset `path` of a table, opened once."""
        if path not in self._opened:
            found = Ragged(self._file.hdf5, f"{table}/offsets", path, dtypes, num_dims)
            if found.num_requests != len(self):
                raise DataError(f"{self.path}: {table}/offsets: is not of {len(self)} requests")
            self._opened[path] = found
        return self._opened[path]

    def _typed(self, path: str, dtype: Any, num_dims: int) -> Any:
        return typed_dataset(self._file.hdf5, path, dtype, num_dims)

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
        """A text of TEXTS, or an array of ARRAYS, by the name of its column."""
        if name in TEXTS:
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
        return self._results.hidden(layer, self.index)

    @property
    def hidden_positions(self) -> Int32Array:
        """The positions (h,) of the rows of `hidden`: prompt tokens are 0 to n - 1, generated ones follow."""
        return self._results.hidden_positions(self.index)

    @property
    def above(self) -> Above | None:
        """The tokens above `score.threshold` at each position of the prompt; None if they are not recorded."""
        return self._results.above(self.index)

    @property
    def experts(self) -> NDArray[Any] | None:
        """The chosen experts (t, L, K) of the computed positions; None if they are not recorded."""
        return self._results.routing("experts", self.index)

    @property
    def routing_weights(self) -> Float32Array | None:
        """The weights (t, L, K) of the chosen experts; None if they are not recorded."""
        return self._results.routing("weights", self.index)

    @property
    def routing(self) -> NDArray[np.int16] | None:
        """The chosen experts as trainers take them: int16 (t, L, K), NOT_RECORDED where there are none.

        There are n + m - 1 rows, fewer only of a request that ended with an error. None if the file has no routing;
        raises DataError if an expert does not fit, or if rows are missing.
        """
        experts = self.experts
        if experts is None:
            return None
        known = (experts != missing_value(experts.dtype)).any(axis=2)
        most = np.iinfo(TRAINER_DTYPE).max
        if known.any() and experts[known].max() > most:
            raise DataError(f"{self._results.path}: an expert beyond {most} does not fit {np.dtype(TRAINER_DTYPE)}")
        num_rows = len(self.prompt) + len(self.tokens) - 1
        if self.finish != "error" and len(experts) < num_rows:
            raise DataError(f"{self._results.path}: request {self.index} has {len(experts)} rows, not {num_rows}")
        routing = np.full(experts.shape, NOT_RECORDED, TRAINER_DTYPE)
        routing[known] = experts[known]
        return routing

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield name and value of all texts that the file has of its requests."""
        for name in TEXTS:
            if self._results.has_text(name):
                yield name, self._results.text(name, self.index)

    def arrays(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield name and values of all arrays that the file has of this request, one in memory at a time."""
        for name in ARRAYS:
            if (found := self._results.array(name, self.index)) is not None:
                yield name, found
        if (above := self.above) is not None:
            yield from ((f"score_above_{name}", values) for name, values in above._asdict().items())
        for name in ("routing", "routing_weights"):
            if (found := getattr(self, name)) is not None:
                yield name, found
        if self._results.hidden_layers:
            yield "hidden_positions", self.hidden_positions
        for layer in self._results.hidden_layers:
            yield f"hidden.{layer}", self.hidden(layer)


def _states_path(layer: int) -> str:
    return f"hidden/values/{layer:03}"
