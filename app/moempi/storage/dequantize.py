"""The source of a quantized matrix: its packed numbers, scales and zero points put together."""

from collections.abc import Callable
from dataclasses import replace

from moempi.arrays import Float32Array
from moempi.config.families import Quantization, part_name
from moempi.errors import DataError
from moempi.storage.checkpoint import CheckpointTensor
from moempi.storage.number_tables import E2M1, E4M3, E8M0, SIGNED, integers
from moempi.storage.tensor_sources import Scaled, Source, Transposed, Unpacked, UnpackedRows, num_blocks
from moempi.storage.tensor_table import TensorTable

_STORED = {"float8": "F8_E4M3", "float4": "U8", "signed": "I8", "offset": "I32"}
PACKED = frozenset(_STORED.values())
"""Types of numbers that are no matrix without scales."""
_SCALES = {"F8_E8M0": E8M0, "U8": E8M0, "F8_E4M3": E4M3}
_SCALE_TYPES = {
    "float8": ("F32", "BF16", "F16", "F8_E8M0", "U8"),
    "float4": ("F8_E8M0", "U8"),
    "signed": ("F32", "BF16", "F16"),
    "offset": ("F32", "BF16", "F16"),
}
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # output 8i + j is number _AWQ_ORDER[j] of word i (AutoAWQ, 2023)


def dequantized(weight: str, how: Quantization, table: TensorTable) -> Source:
    """The matrix `weight`, or the experts of a fused tensor, in float32 or the type of the scales.

    Takes the parts out of `table`. Raises DataError for a part that is missing or of another type or shape.
    """
    numbers = table.take(part_name(how.numbers, weight))
    if numbers.dtype != _STORED[how.code]:
        raise _error(numbers, f"is {numbers.dtype}, quantization_config says {_STORED[how.code]}")
    if how.shape:
        table.take(part_name(how.shape, weight))
    return _PUT_TOGETHER[how.layout](weight, how, numbers, table)


def _rows(weight: str, how: Quantization, numbers: CheckpointTensor, table: TensorTable) -> Source:
    """Numbers (outputs, inputs), or (experts, outputs, inputs), whose inputs may be divided into blocks already."""
    if len(numbers.shape) == 4:
        numbers = replace(numbers, shape=(*numbers.shape[:2], numbers.shape[2] * numbers.shape[3]))
    if len(numbers.shape) not in (2, 3):
        raise _error(numbers, f"its shape is {numbers.shape}, not of a matrix")
    values = Unpacked(numbers, _numbers_table(how))
    blocks = num_blocks(values.shape, how.block)
    scales, zeros = _scales(weight, how, numbers, blocks, table), None
    if how.zeros:
        zeros = _zeros(table.take(part_name(how.zeros, weight)), how)
    return _scaled(values, how, numbers, scales, zeros)


def _scales(
    weight: str, how: Quantization, numbers: CheckpointTensor, blocks: tuple[int, ...], table: TensorTable
) -> Source:
    """Scales of shape `blocks`, the last of whose lengths of 1 may be left out."""
    scales = table.take(*(part_name(name, weight) for name in how.scales))
    known = ("F8_E4M3",) if how.whole_scale else _SCALE_TYPES[how.code]
    if scales.dtype not in known or _without_ones(scales.shape) != _without_ones(blocks):
        raise _wrong_scales(numbers, how)
    number = _as_numbers(replace(scales, shape=blocks))
    if how.whole_scale is None:
        return number
    whole = table.take(part_name(how.whole_scale, weight))
    one = (*blocks[:-2], 1, 1)
    if whole.dtype != "F32" or _without_ones(whole.shape) != _without_ones(one):
        raise _error(whole, f"is {whole.dtype} {whole.shape}, not one F32 number")
    return Scaled(number, replace(whole, shape=one), (0, 0), divides=how.divides)


def _inputs_first(weight: str, how: Quantization, numbers: CheckpointTensor, table: TensorTable) -> Source:
    """GPTQ packs numbers along inputs and zero points along outputs, AWQ both along outputs, in an order of its own."""
    scales = table.take(*(part_name(name, weight) for name in how.scales))
    zeros = table.take(part_name(str(how.zeros), weight))
    if any(len(one.shape) != 2 for one in (numbers, scales, zeros)):
        raise _error(numbers, "it, its scales and its zero points are not three matrices")
    values: Source = Unpacked(Transposed(numbers), integers(how.bits))
    if how.layout == "awq":
        values = UnpackedRows(Transposed(numbers), integers(how.bits), _order(how))
    return _scaled(values, how, numbers, Transposed(scales), _zeros(zeros, how), _groups(weight, how, table))


def _zeros(zeros: CheckpointTensor, how: Quantization) -> Source:
    if zeros.dtype != "I32" or len(zeros.shape) != 2:
        raise _error(zeros, f"is {zeros.dtype} {zeros.shape}, not a matrix of I32")
    words = zeros if how.layout == "rows" else Transposed(zeros)
    return UnpackedRows(words, integers(how.bits, offset=how.zero_offset), _order(how))


def _groups(weight: str, how: Quantization, table: TensorTable) -> CheckpointTensor | None:
    if how.groups is None or not (how.needs_groups or part_name(how.groups, weight) in table):
        return None
    return table.take(part_name(how.groups, weight))


def _scaled(
    values: Source,
    how: Quantization,
    numbers: CheckpointTensor,
    scales: Source,
    zeros: Source | None,
    groups: CheckpointTensor | None = None,
) -> Source:
    blocks = num_blocks(values.shape, how.block)
    if scales.shape != blocks or scales.dtype not in ("F32", "BF16", "F16"):
        raise _wrong_scales(numbers, how)
    if zeros and (zeros.shape[1:] != blocks[1:] or not 0 <= zeros.shape[0] - blocks[0] < 8):
        raise _error(numbers, "its zero points are not one a scale")
    if groups and (groups.dtype, groups.shape) != ("I32", values.shape[1:]):
        raise _error(groups, f"is {groups.dtype} {groups.shape}, not a group (I32) per input")
    return Scaled(values, scales, how.block, zeros=zeros, groups=groups, rounds=how.rounds)


def _numbers_table(how: Quantization) -> Float32Array:
    if how.code == "offset":
        return integers(how.bits, zero=0 if how.zeros else 1 << (how.bits - 1))
    return {"float8": E4M3, "float4": E2M1, "signed": SIGNED}[how.code]


def _order(how: Quantization) -> tuple[int, ...]:
    return _AWQ_ORDER if how.layout == "awq" else tuple(range(32 // how.bits))


def _as_numbers(scales: CheckpointTensor) -> Source:
    return Unpacked(scales, _SCALES[scales.dtype]) if scales.dtype in _SCALES else scales


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _wrong_scales(numbers: CheckpointTensor, how: Quantization) -> DataError:
    rows, columns = (size or "all" for size in how.block)
    return _error(numbers, f"its scales are not one a block of {rows} x {columns}")


def _error(tensor: CheckpointTensor, message: str) -> DataError:
    return DataError(f"{tensor.path}: {tensor.name}: {message}")


_PUT_TOGETHER: dict[str, Callable[[str, Quantization, CheckpointTensor, TensorTable], Source]] = {
    "rows": _rows,
    "gptq": _inputs_first,
    "awq": _inputs_first,
}
