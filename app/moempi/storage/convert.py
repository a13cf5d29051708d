"""From a checkpoint folder to a weight file: renamed, stacked, transposed, otherwise bit for bit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moempi.arrays import is_finite, narrow, widen
from moempi.config.architecture import Architecture
from moempi.config.families import family, read_architecture
from moempi.config.tensors import Tensor, catalogue
from moempi.errors import DataError
from moempi.storage.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint
from moempi.storage.hdf5 import Array
from moempi.storage.weights import Progress, write_weights

PIECE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Summary:
    """What a conversion did; `num_rounded` counts the checkpoint's tensors that had to be rounded to bfloat16."""

    path: Path
    architecture: Architecture
    fingerprint: str
    num_tensors: int
    num_bytes: int
    num_rounded: int
    has_tokenizer: bool


def convert(source: str | Path, path: str | Path, *, progress: Progress | None = None) -> Summary:
    """Write the checkpoint in the folder `source` as the weight file `path`.

    bfloat16 values are kept bit for bit; float16 and float32 are rounded to the nearest bfloat16, ties to even.
    Memory stays near one piece of 4 MiB, one expert's matrix, or one matrix to be transposed. Raises NoInputError,
    DataError naming file and tensor (missing, unknown, wrong shape or type, not finite), and StorageError; then
    `path` is as it was.
    """
    checkpoint = open_checkpoint(source)
    architecture = read_architecture(checkpoint.config, checkpoint.generation, where=str(checkpoint.config_path))
    plan = _plan(checkpoint, architecture)
    fingerprint = write_weights(
        path,
        architecture,
        tokenizer=checkpoint.tokenizer,
        tensors=((tensor, _pieces(tensor, sources)) for tensor, sources in plan.items()),
        progress=progress,
    )
    num_rounded = sum(
        tensor.dtype == "bfloat16" and source.dtype != "BF16" for tensor in plan for source in plan[tensor]
    )
    return Summary(
        path=Path(path),
        architecture=architecture,
        fingerprint=fingerprint,
        num_tensors=len(plan),
        num_bytes=sum(tensor.num_bytes for tensor in plan),
        num_rounded=num_rounded,
        has_tokenizer=bool(checkpoint.tokenizer),
    )


def _plan(checkpoint: Checkpoint, architecture: Architecture) -> Mapping[Tensor, tuple[CheckpointTensor, ...]]:
    """For each of our tensors the checkpoint's tensors that fill it; every one of the checkpoint's is used once."""
    available = dict(checkpoint.tensors)
    if max(architecture.num_layers, architecture.experts.num) > len(available):
        raise DataError(f"{checkpoint.config_path}: asks for more layers or experts than the files have tensors")
    names = family(architecture.family, where=str(checkpoint.config_path))
    plan = {
        tensor: tuple(_take(available, name, tensor, checkpoint) for name in names.sources(tensor))
        for tensor in catalogue(architecture)
    }
    for extra in available.values():
        raise DataError(f"{extra.path}: {extra.name}: is not a tensor of this {architecture.family} model")
    return plan


def _take(
    available: dict[str, CheckpointTensor], name: str, tensor: Tensor, checkpoint: Checkpoint
) -> CheckpointTensor:
    source = available.pop(name, None)
    if source is None:
        raise DataError(f"{checkpoint.folder}: {name}: is missing")
    expected = tensor.shape[1:] if len(tensor.shape) == 3 else tensor.shape
    expected = expected[::-1] if tensor.transposed else expected
    if source.shape != expected:
        raise DataError(f"{source.path}: {name}: its shape is {source.shape}, the configuration says {expected}")
    return source


def _pieces(tensor: Tensor, sources: tuple[CheckpointTensor, ...]) -> Iterator[Array]:
    """The rows of `tensor` from first to last."""
    if len(tensor.shape) == 3:
        for source in sources:
            yield _values(tensor, source, 0, source.shape[0])[np.newaxis]
    elif tensor.transposed:
        whole = _values(tensor, sources[0], 0, sources[0].shape[0])
        step = max(1, PIECE_BYTES // whole[:, :1].nbytes)
        for start in range(0, whole.shape[1], step):
            yield np.ascontiguousarray(whole[:, start : start + step].T)
    else:
        source, rows = sources[0], sources[0].shape[0]
        step = max(1, PIECE_BYTES // max(1, source.row_bytes))
        for start in range(0, rows, step):
            yield _values(tensor, source, start, min(start + step, rows))


def _values(tensor: Tensor, source: CheckpointTensor, start: int, stop: int) -> Array:
    """Rows of the checkpoint's tensor in the type of ours, all finite."""
    rows = source.read(start, stop)
    if tensor.dtype == "bfloat16":
        values = rows if source.dtype == "BF16" else narrow(rows.astype(np.float32, copy=False))
        finite = is_finite(values)
    else:
        values = widen(rows) if source.dtype == "BF16" else rows.astype(np.float32, copy=False)
        finite = bool(np.isfinite(values).all())
    if not finite:
        raise DataError(f"{source.path}: {source.name}: holds NaN, infinity or a number beyond {tensor.dtype}")
    return values
