"""Random weights for any architecture; a seed gives the same file on every machine."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash

from moempi.arrays import narrow
from moempi.config.architecture import Architecture
from moempi.config.tensors import Tensor, catalogue
from moempi.errors import StorageError
from moempi.storage.hdf5 import AnyArray
from moempi.storage.weights import OnProgress, write_weights

VECTOR_DEVIATION = 0.1
# The sum of four uniform 16-bit integers: its mean and standard deviation.
SUM_MEAN = 2 * 0xFFFF
SUM_DEVIATION = float(np.sqrt((2.0**32 - 1) / 3))


def initialize(architecture: Architecture, path: str | Path, *, seed: int, progress: OnProgress | None = None) -> str:
    """Write a weight file of random weights without a tokenizer; returns its fingerprint.

    Matrices have mean 0 and standard deviation 1/sqrt(inputs); norms have mean 1, biases mean 0, both deviation 0.1.
    Every block of rows is a function of (seed, tensor name, block) alone. Memory holds one block. Raises StorageError
    if the weights do not fit the disk, or writing fails.
    """
    _require_free(Path(path), sum(tensor.num_bytes for tensor in catalogue(architecture)))
    tensors = ((tensor, _blocks(tensor, seed)) for tensor in catalogue(architecture))
    return write_weights(path, architecture, tokenizer="", tensors=tensors, progress=progress)


def _require_free(path: Path, num_bytes: int) -> None:
    """Refuse sizes that no disk holds before a file of that size is laid out."""
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror}") from error
    if num_bytes > free:
        raise StorageError(f"{path}: cannot be written: {num_bytes:,} bytes are needed, {free:,} are free")


def _blocks(tensor: Tensor, seed: int) -> Iterator[AnyArray]:
    mean, deviation = _distribution(tensor)
    for block in range(tensor.num_blocks):
        start = block * tensor.block_rows
        shape = (min(tensor.block_rows, tensor.shape[0] - start), *tensor.shape[1:])
        values = _normal(shape, (seed, xxhash.xxh3_64_intdigest(tensor.name.encode()), block))
        values *= np.float32(deviation)
        values += np.float32(mean)
        yield narrow(values) if tensor.dtype == "bfloat16" else values


def _distribution(tensor: Tensor) -> tuple[float, float]:
    if len(tensor.shape) == 1 or tensor.name.endswith("_bias"):
        return float(tensor.name.endswith("norm")), VECTOR_DEVIATION
    inputs = tensor.shape[0] if tensor.transposed else tensor.shape[-1]
    return 0.0, inputs**-0.5


def _normal(shape: tuple[int, ...], key: tuple[int, ...]) -> AnyArray:
    """Approximately normal float32 numbers: sums of four uniform integers, which every machine computes exactly."""
    count = int(np.prod(shape))
    quarters = np.random.Philox(np.random.SeedSequence(key)).random_raw(count).view(np.uint16).reshape(count, 4)
    sums = quarters.sum(axis=1, dtype=np.int32)
    values: AnyArray = (sums - SUM_MEAN).astype(np.float32)
    values /= np.float32(SUM_DEVIATION)
    return values.reshape(shape)
