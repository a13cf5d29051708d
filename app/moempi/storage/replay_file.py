"""Routing that a job is given: the experts of requests at positions, in a results file or in HDF5 of the same shape."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from moempi.arrays import BoolArray, Float32Array, IntArray
from moempi.config.architecture import Architecture
from moempi.errors import DataError
from moempi.storage.closeable import Closeable
from moempi.storage.hdf5 import open_dataset, open_file, raising_data_errors, read_attribute, walk
from moempi.storage.results import Ragged, typed_dataset
from moempi.storage.results_layout import FORMAT, VERSION, missing_value

EXPERT_TYPES = (np.uint8, np.uint16, np.int16, np.int32, np.int64)
BLOCK_ROWS = 1 << 14
NOT_GIVEN = -1
"""The experts of a row without a route."""


class ReplayFile(Closeable):
    """The routing in the file `path`, which fits the MoE layers and experts of `architecture`.

    `offsets` (N + 1) divide the rows (t, L, K) of `experts` among N requests, whose first row is position 0; `layer`
    (L,) are all MoE layers, and `weights` (t, L, K), if there are any, those of the experts. In a results file these
    are in /routing, and its ids name the requests. In any other file they are at the root; `id` (N,), fixed-length
    strings, names the requests, otherwise they are those of the job, in order. A row of experts that are all -1, or the
    largest number of an unsigned type, is no route. Raises NoInputError, or DataError if the file does not fit.
    """

    def __init__(self, path: str | Path, architecture: Architecture) -> None:
        self.path = path
        self._architecture = architecture
        self._numbers: dict[str, int] | None = None
        self._file = open_file(path)
        try:
            with raising_data_errors(path, "routing"):
                self._names = dict(walk(self._file))
                self._open()
        except BaseException:
            self._file.close()
            raise

    @property
    def has_weights(self) -> bool:
        """Whether the file has weights of the experts."""
        return self._weights is not None

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self._architecture.experts.router.top_k

    def read_ids(self) -> None:
        """Read all ids, by which `requests_of` and `request_of` find requests; raises DataError if they do not fit."""
        with raising_data_errors(self.path, "id"):
            ids = self._ids()
        if ids is not None and (len(ids) != len(self._offsets) - 1 or len(set(ids)) != len(ids)):
            raise DataError(f"{self.path}: its ids are not one for each request, or not unique")
        self._numbers = None if ids is None else {name: number for number, name in enumerate(ids)}

    def requests_of(self, ids: Sequence[str]) -> IntArray:
        """The request of the file for each request of a job with these `ids` (N,), -1 where it has none.

        Raises DataError if it has none of them, or, without ids, another number of requests.
        """
        num_requests = len(self._offsets) - 1
        if self._numbers is None:
            if num_requests != len(ids):
                raise DataError(f"{self.path}: has routing of {num_requests} requests without ids, the job {len(ids)}")
            return np.arange(len(ids))
        found = np.array([self._numbers.get(name, -1) for name in ids], np.int64)
        if (found < 0).all():
            raise DataError(f"{self.path}: has routing of none of the {len(ids)} requests of the job")
        return found

    def request_of(self, names: Sequence[str]) -> int:
        """The request of the file with the first of these `names` that it has; its only one if it has no ids.

        Raises DataError if there is none.
        """
        if self._numbers is None:
            num_requests = len(self._offsets) - 1
            if num_requests != 1:
                raise DataError(f"{self.path}: has routing of {num_requests} requests without ids, a line needs 1")
            return 0
        found = next((self._numbers[name] for name in names if name in self._numbers), None)
        if found is None:
            raise DataError(f"{self.path}: has no routing of request {names[0][:100]!r}")
        return found

    def num_positions(self, request: int) -> int:
        """The number of positions of a request of the file."""
        return int(self._offsets[request + 1] - self._offsets[request])

    def require_valid(self, *, weights: bool, on_block: Callable[[], object] = lambda: None) -> None:
        """Read all experts, and the `weights` if they are used, a block at a time; calls `on_block` before each.

        Raises DataError at a row that is no route, and at a route with a weight that is negative or not finite.
        """
        for start in range(0, self._experts.shape[0], BLOCK_ROWS):
            on_block()
            rows = slice(start, start + BLOCK_ROWS)
            with raising_data_errors(self.path, "routing"):
                experts = self._given(self._experts[rows])
                weight = self._weights[rows] if weights and self._weights is not None else None
            is_given = (experts != NOT_GIVEN).any(axis=2)
            ordered = np.sort(experts, axis=2)
            is_route = (ordered[:, :, 0] >= 0) & (ordered[:, :, -1] < self._architecture.experts.num)
            is_route &= (np.diff(ordered, axis=2) > 0).all(axis=2)
            wanted = f"{self.top_k} different ones of {self._architecture.experts.num}"
            self._require_all(is_route | ~is_given, start, experts, f"experts {{}}: not {wanted}")
            if weight is not None:
                is_weight = (np.isfinite(weight) & (weight >= 0)).all(axis=2)
                self._require_all(is_weight | ~is_given, start, weight, "weights {}: negative or not finite")

    def read(self, request: int, start: int, stop: int, layers: slice) -> tuple[IntArray, Float32Array | None]:
        """Experts (stop - start, layers, K) and weights of positions of a request of the file; NOT_GIVEN beyond its."""
        first, end = (int(self._offsets[request + at]) for at in (0, 1))
        rows = slice(min(first + start, end), min(first + stop, end))
        with raising_data_errors(self.path, "routing"):
            experts = self._given(self._experts[rows, layers])
            weights = None if self._weights is None else self._weights[rows, layers]
        missing = (stop - start) - len(experts)
        experts = np.pad(experts, ((0, missing), (0, 0), (0, 0)), constant_values=NOT_GIVEN)
        return experts, None if weights is None else np.pad(weights, ((0, missing), (0, 0), (0, 0)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self) -> None:
        if not self._architecture.moe_layers:
            raise DataError(f"{self.path}: has routing, the model no MoE layers")
        self._is_results = read_attribute(self._file, "format") == FORMAT
        version = read_attribute(self._file, "version")
        if self._is_results and version != VERSION:
            raise DataError(f"{self.path}: not a results file of layout {VERSION}: it says {version}")
        folder = "routing/" if self._is_results else ""
        if f"{folder}experts" not in self._names:
            raise DataError(f"{self.path}: has no {folder}experts; record it with --set trace.routing=experts")
        self._experts = typed_dataset(self._file, f"{folder}experts", EXPERT_TYPES, 3)
        self._offsets = Ragged(self._file, f"{folder}offsets", f"{folder}experts", EXPERT_TYPES, 3).offsets
        layers = tuple(typed_dataset(self._file, f"{folder}layer", np.int32, 1)[:].tolist())
        experts = self._architecture.experts
        found, expected = (layers, self._experts.shape[2]), (self._architecture.moe_layers, experts.router.top_k)
        if found != expected or self._experts.shape[1] != len(layers):
            raise DataError(
                f"{self.path}: has top-{found[1]} of {len(layers)} layers, the model top-{expected[1]} of its "
                f"{len(expected[0])} MoE layers, {expected[0][0]} to {expected[0][-1]}"
            )
        self._weights = None
        if f"{folder}weights" in self._names:
            self._weights = typed_dataset(self._file, f"{folder}weights", np.float32, 3)
            if self._weights.shape != self._experts.shape:
                raise DataError(f"{self.path}: weights are {self._weights.shape}, experts {self._experts.shape}")

    def _ids(self) -> list[str] | None:
        if self._is_results:
            column = Ragged(self._file, "requests/utf8/id/offsets", "requests/utf8/id/values", np.uint8, 1)
            return [bytes(value).decode() for value in column.read(0, column.num_requests)]
        if "id" not in self._names:
            return None
        dataset = h5py.Dataset(open_dataset(self._file, "id"))
        if dataset.dtype.kind != "S" or dataset.ndim != 1:
            raise DataError(f"{self.path}: id: is {dataset.dtype} {dataset.shape}, not fixed-length strings")
        return [value.decode() for value in dataset[:].tolist()]

    def _require_all(self, is_good: BoolArray, start: int, values: NDArray[Any], what: str) -> None:
        """Raise DataError with the first of the `values` (T, L, K) of rows from `start` that is not good (T, L)."""
        bad = np.argwhere(~is_good)
        if len(bad):
            row, layer = bad[0].tolist()
            request = int(np.searchsorted(self._offsets, start + row, side="right")) - 1
            where = f"request {request}, position {start + row - int(self._offsets[request])}"
            where += f", layer {self._architecture.moe_layers[layer]}"
            raise DataError(f"{self.path}: {where}, {what.format(values[row, layer].tolist())}")

    def _given(self, experts: NDArray[Any]) -> IntArray:
        """Experts as int32, NOT_GIVEN in rows without a route; what no int32 holds is beyond all experts."""
        is_missing = (experts == missing_value(experts.dtype)).all(axis=2, keepdims=True)
        return np.where(is_missing, NOT_GIVEN, np.clip(experts, -2, 2**31 - 1)).astype(np.int32)
