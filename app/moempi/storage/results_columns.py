"""Datasets of a results file: contiguous, along named dimensions, with the attributes long_name and units."""

from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p
from numpy.typing import NDArray

from moempi.storage.hdf5 import write_attribute


def write_offsets(file: Any, path: str, lengths: NDArray[Any]) -> None:
    """Write the offsets (N + 1,) of each request's rows, given the number of rows per request, `lengths` (N,)."""
    dataset = create(file, path, np.int64, ("request_bound",), "request i has rows offsets[i] to offsets[i + 1] - 1")
    dataset[...] = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def create(
    file: Any, path: str, dtype: Any, dims: tuple[str, ...], long_name: str, *, units: str = "1", fill_value: Any = None
) -> Any:
    """Create a dataset along dimensions from `create_scale`; entries that are never written read as `fill_value`."""
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    if fill_value is not None:
        creation.set_fill_value(np.array(fill_value, None if isinstance(dtype, h5py.Datatype) else dtype))
    dataset = file.create_dataset(path, shape=tuple(file[dim].shape[0] for dim in dims), dtype=dtype, dcpl=creation)
    for axis, dim in enumerate(dims):
        dataset.dims[axis].attach_scale(file[dim])
    write_attribute(file, "long_name", long_name, owner=dataset.id)
    write_attribute(file, "units", units, owner=dataset.id)
    return dataset


def create_scale(file: Any, dim: str, size: int) -> None:
    """Create a dimension of `size` rows."""
    # The netCDF convention for a dimension without coordinates; only the request dimension has coordinates.
    name = f"This is a netCDF dimension but not a netCDF variable. {size:9d}"
    if dim == "request":
        file.create_dataset(dim, data=np.arange(size)).make_scale(dim)
    else:
        file.create_dataset(dim, shape=(size,), dtype=np.uint8).make_scale(name)
