"""Conversion of a checkpoint folder to a weight file: renames, stacks and transposes, keeps bfloat16 bits."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from moempi.arrays import is_finite, narrow, widen
from moempi.config.architecture import Architecture
from moempi.config.families import (
    Family,
    Fused,
    OnePlus,
    Rows,
    Sources,
    checkpoint_family,
    checkpoint_predicting_layers,
    checkpoint_quantization,
    is_other_part,
    part_name,
    read_architecture,
)
from moempi.config.recommended import recommended_sampling
from moempi.config.tensors import Share, Tensor, catalogue
from moempi.errors import DataError
from moempi.storage.checkpoint import Checkpoint, CheckpointTensor, open_checkpoint
from moempi.storage.dequantize import PACKED, dequantized
from moempi.storage.hdf5 import AnyArray
from moempi.storage.tensor_sources import FusedExpert, GroupedRows, Increased, Source
from moempi.storage.tensor_table import TensorTable
from moempi.storage.weights import OnProgress, write_weights

PIECE_BYTES = 4 << 20
FLOATS = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Summary:
    """Result of a conversion.

    `num_rounded` counts the checkpoint's tensors that were rounded to bfloat16, `num_other_parts` the tensors of parts
    for images or sound, which are left out.
    """

    path: Path
    architecture: Architecture
    fingerprint: str
    num_tensors: int
    num_bytes: int
    num_rounded: int
    num_other_parts: int
    has_tokenizer: bool


def convert(source: str | Path, path: str | Path, *, progress: OnProgress | None = None) -> Summary:
    """Write the checkpoint in the folder `source` as the weight file `path`.

    Keeps bfloat16 bits. Rounds float16, float32 and dequantized numbers to the nearest bfloat16, ties to even. Memory
    holds about one piece of 4 MiB, one expert's matrix, or one matrix to transpose. Raises NoInputError, DataError that
    names file and tensor (missing, unknown, wrong shape or type, not finite), or StorageError, and leaves `path`
    unchanged.
    """
    checkpoint = open_checkpoint(source)
    architecture = read_architecture(checkpoint.config, checkpoint.generation, origin=str(checkpoint.config_path))
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not is_other_part(name)}
    plan = _ConversionPlan(checkpoint, tensors, architecture).sources
    fingerprint = write_weights(
        path,
        architecture,
        tokenizer=checkpoint.tokenizer,
        chat=checkpoint.chat,
        sampling=recommended_sampling(checkpoint.generation),
        tensors=((tensor, _pieces(tensor, sources)) for tensor, sources in plan.items()),
        progress=progress,
    )
    rounded = {
        (source.path, source.name)
        for tensor in plan
        for source in plan[tensor]
        if tensor.dtype == "bfloat16" and source.dtype != "BF16"
    }
    return Summary(
        path=Path(path),
        architecture=architecture,
        fingerprint=fingerprint,
        num_tensors=len(plan),
        num_bytes=sum(tensor.num_bytes for tensor in plan),
        num_rounded=len(rounded),
        num_other_parts=len(checkpoint.tensors) - len(tensors),
        has_tokenizer=bool(checkpoint.tokenizer),
    )


class _ConversionPlan:
    """The `sources` of each of our tensors; raises DataError for a tensor of the checkpoint that has no use."""

    def __init__(
        self, checkpoint: Checkpoint, tensors: Mapping[str, CheckpointTensor], architecture: Architecture
    ) -> None:
        if architecture.num_layers > len(tensors):
            raise DataError(f"{checkpoint.config_path}: asks for more layers than the files have tensors")
        self._table = TensorTable(checkpoint.folder, tensors)
        self._architecture = architecture
        origin = str(checkpoint.config_path)
        self._quantization = checkpoint_quantization(checkpoint.config, origin=origin)
        names = checkpoint_family(checkpoint.config, origin=origin)
        self.sources = {
            tensor: tuple(self._checked(source, tensor) for source in self._sources(self._names(names, tensor), tensor))
            for tensor in catalogue(architecture)
        }
        if architecture.tied_embeddings:
            self._require_same_head(names, next(iter(self.sources)))
        predicting = checkpoint_predicting_layers(checkpoint.config, architecture.num_layers, origin=origin)
        for name, extra in self._table.unused():
            if not names.leaves_out(name, predicting=predicting) and not self._is_no_bias(name, extra):
                raise DataError(f"{extra.path}: {extra.name}: is not a tensor of this {architecture.family} model")

    def _names(self, names: Family, tensor: Tensor) -> Sources:
        """The names of `tensor` that this checkpoint has: of the hub, or with fused experts."""
        hub, fused = names.sources(tensor), names.fused_sources(tensor)
        if fused is None or isinstance(hub, Fused):
            return hub
        first = fused[0] if isinstance(fused, tuple) else fused.name
        return fused if self._numbers_name(first) in self._table else hub

    def _numbers_name(self, name: str) -> str:
        """The name of the tensor that holds the numbers of the matrix `name`, packed or not."""
        packed = part_name(self._quantization.numbers, name) if self._quantization else name
        return packed if packed in self._table else name

    def _sources(self, names: Sources, tensor: Tensor) -> Iterator[Source]:
        match names:
            case Fused():
                yield from self._fused_experts(names, tensor)
            case Rows():
                yield self._grouped_rows(names)
            case OnePlus():
                yield Increased(self._source(names.name))
            case _:
                yield from map(self._source, names)

    def _grouped_rows(self, rows: Rows) -> GroupedRows:
        whole, parts = self._source(rows.name), rows.parts(self._architecture)
        if not whole.shape or whole.shape[0] % sum(parts):
            raise DataError(
                f"{whole.path}: {whole.name}: its shape is {whole.shape}, the configuration says groups of "
                f"{sum(parts)} rows"
            )
        return GroupedRows(whole, sum(parts), sum(parts[: rows.part]), parts[rows.part])

    def _source(self, name: str) -> Source:
        """The values of the checkpoint's tensor `name`."""
        stored = self._table.take(self._numbers_name(name))
        if stored.dtype not in PACKED:
            return stored
        if self._quantization is None:
            raise DataError(f"{stored.path}: {stored.name}: is {stored.dtype} without a quantization_config")
        return dequantized(name, self._quantization, self._table)

    def _is_no_bias(self, name: str, bias: CheckpointTensor) -> bool:
        """Whether a tensor is the bias of zeros that some programs give every quantized matrix."""
        if self._quantization is None or not name.endswith(".bias"):
            return False
        if bias.dtype not in FLOATS or len(bias.shape) != 1:
            return False
        matrix = part_name(self._quantization.numbers, f"{name.removesuffix('.bias')}.weight")
        return self._table.is_used(matrix) and not bias.read(0, bias.shape[0]).any()

    def _require_same_head(self, names: Family, embedding: Tensor) -> None:
        """A head beside tied embeddings must be the same matrix."""
        name = str(names.names["head"])
        if self._numbers_name(name) not in self._table:
            return
        head = self._checked(self._source(name), embedding)
        (source,) = self.sources[embedding]
        if not _same_values(embedding, head, source):
            raise DataError(
                f"{head.path}: {head.name}: differs from {source.name}, though tie_word_embeddings is true; "
                f"set that to false in config.json if the head is meant"
            )

    def _fused_experts(self, fused: Fused, tensor: Tensor) -> Iterator[FusedExpert]:
        num_experts, matrices = tensor.shape[0], len(tensor.shape) == 3
        whole = self._source(fused.name)
        if len(whole.shape) != len(tensor.shape) or whole.shape[0] != num_experts:
            raise DataError(f"{whole.path}: {whole.name}: its shape is {whole.shape}, not of {num_experts} experts")
        transposed = matrices and fused.inputs_first and not self._has_outputs_first(whole, fused, tensor)
        num_outputs = whole.shape[-1] if transposed else whole.shape[1]
        if num_outputs % fused.parts:
            raise DataError(f"{whole.path}: {whole.name}: its {num_outputs} outputs are not {fused.parts} equal parts")
        for expert in range(num_experts):
            yield FusedExpert(whole, expert, fused.outputs(num_outputs), transposed)

    def _has_outputs_first(self, whole: Source, fused: Fused, tensor: Tensor) -> bool:
        """Whether a fused tensor is (outputs, inputs) though its family has it the other way: its shape tells.

        transformers saves it so if it has the experts of Qwen3-VL-MoE in memory, and quantized blocks are so.
        """
        if not isinstance(whole, CheckpointTensor) and self._quantization and self._quantization.outputs_first:
            return True
        outputs, inputs = tensor.shape[1] * fused.parts, tensor.shape[2]
        return outputs != inputs and whole.shape[1:] == (outputs, inputs)

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


def _same_values(tensor: Tensor, one: Source, other: Source) -> bool:
    step = max(1, PIECE_BYTES // (4 * tensor.shape[1]))
    starts = range(0, tensor.shape[0], step)
    ranges = [(start, min(start + step, tensor.shape[0])) for start in starts]
    return all(np.array_equal(_values(tensor, one, *rows), _values(tensor, other, *rows)) for rows in ranges)


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
