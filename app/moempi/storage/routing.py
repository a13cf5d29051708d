"""Reading recorded routing from a results file, one layer at a time."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moempi.errors import DataError
from moempi.storage.closeable import Closeable
from moempi.storage.hdf5 import open_file, raising_data_errors, read_attribute, walk
from moempi.storage.results import typed_dataset
from moempi.storage.results_layout import FORMAT, HOME, HOSTED, TRACES, VERSION, missing_value

MAX_SECONDS = 1e15

Columns = dict[str, NDArray[Any]]


class RoutingFile(Closeable):
    """The recorded routing of the results file `path`.

    `layers` are the Mixture-of-Experts layers. `ranks` holds the columns of /placement, one row per rank and run,
    `hosted` the columns of /placement/hosted and `counters` the columns of /network. `compute_s` is the compute time
    summed over all ranks. `has_home` is whether it says where rows were routed. Raises NoInputError if the file cannot
    be read and DataError if it holds no recorded routing or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._file = open_file(path)
        try:
            if (read_attribute(self._file, "format"), read_attribute(self._file, "version")) != (FORMAT, VERSION):
                raise DataError(f"{path}: not a results file of layout {VERSION}")
            names = [name for name, is_group in walk(self._file) if not is_group]
            if "routing/experts" not in names:
                raise DataError(f"{path}: holds no recorded routing; run the job with --set trace.routing=experts")
            with raising_data_errors(path, "routing"):
                self._open(names)
        except BaseException:
            self._file.close()
            raise

    def layer(self, index: int, *, first: int = 0, last: int | None = None) -> Columns:
        """Read the routing of tokens `first` to `last` - 1 in layer layers[index].

        Returns `request` (T,), `experts` (T, K) and, if the file `has_home`, `rank`, `row` and `step` (T,). Leaves out
        tokens whose routing was lost with a node. Raises DataError.
        """
        stop = self.num_tokens if last is None else min(last, self.num_tokens)
        with raising_data_errors(self.path, f"routing of layer {self.layers[index]}"):
            found: Columns = {
                name: dataset[first:stop] if dataset.ndim == 1 else dataset[first:stop, index]
                for name, dataset in self._columns.items()
            }
        found["request"] = np.searchsorted(self._offsets, np.arange(first, stop), side="right") - 1
        known = (found["experts"] != missing_value(found["experts"].dtype)).any(axis=1)
        found = {name: column[known].astype(np.int64) for name, column in found.items()}
        for name in HOME if self.has_home else ():
            if len(found[name]) and found[name].min() < 0:
                raise DataError(f"{self.path}: routing/{name}: negative")
        if found["experts"].size and not 0 <= found["experts"].min() <= found["experts"].max() < self.num_experts:
            raise DataError(f"{self.path}: routing/experts: beyond the {self.num_experts} experts")
        return found

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _open(self, names: list[str]) -> None:
        self.has_home = "routing/rank" in names
        self._columns = {
            name: typed_dataset(self._file, column.path, column.dtypes, len(column.dims))
            for name, column in TRACES["routing"].items()
            if name == "experts" or (self.has_home and name in HOME)
        }
        self.num_tokens, num_layers, self.top_k = self._columns["experts"].shape
        shapes = {"step": (self.num_tokens,)}
        for name, dataset in self._columns.items():
            if name != "experts" and dataset.shape != shapes.get(name, (self.num_tokens, num_layers)):
                raise DataError(f"{self.path}: routing/{name}: {dataset.shape} beside {self.num_tokens} tokens")
        self.layers = tuple(self._vector("routing/layer", np.int32).tolist())
        self._offsets = self._vector("routing/offsets", np.int64)
        if not self.layers or any(b <= a for a, b in pairwise((-1, *self.layers))):
            raise DataError(f"{self.path}: routing/layer: does not ascend from 0 or above")
        if len(self.layers) != num_layers or not len(self._offsets) or self._offsets[-1] != self.num_tokens:
            raise DataError(f"{self.path}: routing/layer or routing/offsets do not fit its experts")
        num_rows, self.num_experts = typed_dataset(self._file, "experts/load", np.dtype(np.int64), 2).shape
        # Before results named them, each layer had a row.
        known = self._vector("experts/layer", np.int32).tolist() if "experts/layer" in names else range(num_rows)
        if len(known) != num_rows or not set(self.layers) <= set(known):
            raise DataError(f"{self.path}: experts/load: has {num_rows} layers, not those of routing/layer")
        self.ranks = self._group(names, "placement/", np.int64)
        self.counters = self._group(names, "network/", np.int64)
        self.hosted = {name: self._vector(f"placement/hosted/{name}", np.int32) for name in HOSTED}
        self.compute_s = float(self._vector("timing/compute", np.float64).sum())
        self._check_columns()

    def _check_columns(self) -> None:
        """Raise DataError unless the columns of a group have one length, and ranks and experts are in range."""
        for group, columns in (("placement", self.ranks), ("placement/hosted", self.hosted)):
            if len({len(column) for column in columns.values()}) > 1:
                raise DataError(f"{self.path}: {group}: its columns have different lengths")
        num_ranks = len(next(iter(self.ranks.values()), ()))
        for name, limit in (("row", num_ranks), ("expert", self.num_experts)):
            if ((self.hosted[name] < 0) | (self.hosted[name] >= limit)).any():
                raise DataError(f"{self.path}: placement/hosted/{name}: is not from 0 to {limit - 1}")
        if not 0 <= self.compute_s <= MAX_SECONDS:
            raise DataError(f"{self.path}: timing/compute: adds up to {self.compute_s:g} s")

    def _group(self, names: list[str], prefix: str, dtype: type[np.generic]) -> Columns:
        own = [name for name in names if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
        return {name.removeprefix(prefix): self._vector(name, dtype) for name in own}

    def _vector(self, name: str, dtype: type[np.generic]) -> NDArray[Any]:
        values: NDArray[Any] = typed_dataset(self._file, name, np.dtype(dtype), 1)[:]
        return values
