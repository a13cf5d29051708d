"""Conversion of a checkpoint folder to a weight file: renames, stacks and transposes, keeps bfloat16 bits."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from moempi.arrays import is_finite, narrow, widen
from moempi.config.architecture import Architecture
from moempi.config.families import Fused, family, read_architecture
from moempi.config.recommended import recommended_sampling
from moempi.config.tensors import Share, Tensor, catalogue
from moempi.errors import DataError
from moempi.storage.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint
from moempi.storage.hdf5 import AnyArray
from moempi.storage.tensor_sources import Fp8Matrix, FusedExpert, Mxfp4Experts, Source
from moempi.storage.weights import OnProgress, write_weights

PIECE_BYTES = 4 << 20
FLOATS = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Summary:
    """Result of a conversion; `num_rounded` counts the checkpoint's tensors that were rounded to bfloat16."""

    path: Path
    architecture: Architecture
    fingerprint: str
    num_tensors: int
    num_bytes: int
    num_rounded: int
    has_tokenizer: bool


def convert(source: str | Path, path: str | Path, *, progress: OnProgress | None = None) -> Summary:
    """Write the checkpoint in the folder `source` as the weight file `path`.

    Keeps bfloat16 bits. Rounds float16, float32 and quantized blocks (dequantized to float32) to the nearest bfloat16,
    ties to even. Memory holds about one piece of 4 MiB, one expert's matrix, or one matrix to transpose. Raises
    NoInputError, DataError that names file and tensor (missing, unknown, wrong shape or type, not finite), or
    StorageError, and leaves `path` unchanged.
    """
    checkpoint = open_checkpoint(source)
    architecture = read_architecture(checkpoint.config, checkpoint.generation, origin=str(checkpoint.config_path))
    plan = _ConversionPlan(checkpoint, architecture).sources
    fingerprint = write_weights(
        path,
        architecture,
        tokenizer=checkpoint.tokenizer,
        chat=checkpoint.chat,
        sampling=recommended_sampling(checkpoint.generation),
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


class _ConversionPlan:
    """The `sources` of each of our tensors; raises DataError for a tensor of the checkpoint that has no use."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        if max(architecture.num_layers, architecture.experts.num) > len(checkpoint.tensors):
            raise DataError(f"{checkpoint.config_path}: asks for more layers or experts than the files have tensors")
        self._checkpoint = checkpoint
        self._used: set[str] = set()
        names = family(architecture.family, origin=str(checkpoint.config_path))
        self.sources = {
            tensor: tuple(self._checked(source, tensor) for source in self._sources(names.sources(tensor), tensor))
            for tensor in catalogue(architecture)
        }
        for name, extra in checkpoint.tensors.items():
            if name not in self._used and not names.leaves_out(name, num_layers=architecture.num_layers):
                raise DataError(f"{extra.path}: {name}: is not a tensor of this {architecture.family} model")

    def _sources(self, names: tuple[str, ...] | Fused, tensor: Tensor) -> Iterator[Source]:
        if isinstance(names, Fused):
            yield from self._fused_experts(names, tensor)
            return
        for name in names:
            source = self._take(name)
            yield self._dequantized(source) if source.dtype == "F8_E4M3" else source

    def _take(self, name: str) -> CheckpointTensor:
        source = self._checkpoint.tensors.get(name)
        if source is None:
            raise DataError(f"{self._checkpoint.folder}: {name}: is missing")
        self._used.add(name)
        return source

    def _dequantized(self, weight: CheckpointTensor) -> Fp8Matrix:
        matrix = Fp8Matrix(weight, self._take(f"{weight.name}_scale_inv"))
        if not matrix.scales_fit():
            raise DataError(f"{matrix.path}: {matrix.name}: its scales are not one float32 a block of 128 x 128")
        return matrix

    def _fused_experts(self, fused: Fused, tensor: Tensor) -> Iterator[FusedExpert]:
        num_experts, matrices = tensor.shape[0], len(tensor.shape) == 3
        whole: CheckpointTensor | Mxfp4Experts
        if f"{fused.name}_blocks" in self._checkpoint.tensors:
            whole = Mxfp4Experts(self._take(f"{fused.name}_blocks"), self._take(f"{fused.name}_scales"))
            if not whole.scales_fit():
                raise DataError(f"{whole.path}: {whole.name}: its blocks are not 16 bytes with an exponent each")
        else:
            whole = self._take(fused.name)
        if len(whole.shape) != len(tensor.shape) or whole.shape[0] != num_experts:
            raise DataError(f"{whole.path}: {whole.name}: its shape is {whole.shape}, not of {num_experts} experts")
        transposed = matrices and isinstance(whole, CheckpointTensor)
        for expert in range(num_experts):
            yield FusedExpert(whole, expert, fused.first, fused.step, transposed)

    def _checked(self, source: Source, tensor: Tensor) -> Source:
        expected = tensor.shape[1:] if tensor.share is Share.EXPERTS else tensor.shape
        expected = expected[::-1] if tensor.transposed else expected
        if isinstance(source, CheckpointTensor) and source.shape == (1, *expected):
            source = replace(source, shape=expected)
        name = f"{source.path}: {source.name}"
        if source.shape != expected:
            raise DataError(f"{name}: its shape is {source.shape}, the configuration says {expected}")
        if source.dtype not in FLOATS:
            raise DataError(f"{name}: its type is {source.dtype}, only {', '.join(FLOATS)} is possible there")
        return source


def _pieces(tensor: Tensor, sources: tuple[Source, ...]) -> Iterator[AnyArray]:
    """The rows of `tensor` from first to last."""
    if tensor.share is Share.EXPERTS:
        for source in sources:
            yield _values(tensor, source, 0, source.shape[0])[np.newaxis]
    elif tensor.transposed:
        whole = _values(tensor, sources[0], 0, sources[0].shape[0])
        step = max(1, PIECE_BYTES // whole[:, :1].nbytes)
        for start in range(0, whole.shape[1], step):
            yield np.ascontiguousarray(whole[:, start : start + step].T)
    else:
        source, rows = sources[0], sources[0].shape[0]
        step = max(1, PIECE_BYTES // max(1, FLOATS[source.dtype] * prod(source.shape[1:])))
        for start in range(0, rows, step):
            yield _values(tensor, source, start, min(start + step, rows))


def _values(tensor: Tensor, source: Source, start: int, stop: int) -> AnyArray:
    """Rows of the source in the type of our tensor; raises DataError unless all are finite."""
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
