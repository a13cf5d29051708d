"""Sources of a tensor's values: a checkpoint's tensor, a quantized tensor, or one expert of a fused tensor."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from moempi.arrays import Float32Array, widen
from moempi.storage.checkpoint import CheckpointTensor
from moempi.storage.hdf5 import AnyArray

MXFP4_BLOCK = 32
MXFP4_BIAS = 127
E8M0_NAN = 255


class Source(Protocol):
    """Rows that can be read; `dtype` is the safetensors name of their type."""

    @property
    def path(self) -> Path:
        """The file, for messages."""

    @property
    def name(self) -> str:
        """The tensor's name, for messages."""

    @property
    def dtype(self) -> str:
        """The type of what `read` returns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all rows."""

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop); raises DataError if the file is too short."""


def _e4m3_values() -> AnyArray:
    """The 256 values of float8 e4m3fn: sign, 4 exponent bits with bias 7, 3 fraction bits; NaN but no infinity."""
    bits = np.arange(256)
    exponent, fraction = bits >> 3 & 15, (bits & 7) / 8
    values = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    values[bits & 127 == 127] = np.nan
    return np.where(bits < 128, values, -values).astype(np.float32)


def _e8m0_values() -> AnyArray:
    """The 256 values of float8 e8m0: powers of two with bias 127, and NaN (OCP MX, 2023)."""
    values = np.ldexp(np.float32(1), np.arange(256) - 127)
    values[E8M0_NAN] = np.nan
    return values


E4M3 = _e4m3_values()
with np.errstate(over="ignore"):
    E8M0 = _e8m0_values()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
"""Types of the scales of 8-bit matrices; bytes are exponents."""


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix of 8-bit numbers with one scale per block of rows and columns (DeepSeek-V3, 2024, section 3.3).

    A block size of 0 stands for all rows or all columns. Scales are float32, bfloat16, float16 or powers of two.
    """

    weight: CheckpointTensor
    scales: CheckpointTensor
    block: tuple[int, int]
    dtype: str = "F32"

    @property
    def path(self) -> Path:
        return self.weight.path

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """Blocks of rows, and of columns."""
        return tuple(-(-size // max(block or size, 1)) for size, block in zip(self.shape, self.block, strict=True))

    def scales_fit(self) -> bool:
        """Whether there is one scale per block; last dimensions of 1 may be left out."""
        if len(self.shape) != 2 or self.scales.dtype not in SCALES:
            return False
        rows, columns = self.num_blocks
        left_out = {(rows,): columns, (): rows * columns}
        return self.scales.shape == (rows, columns) or left_out.get(self.scales.shape) == 1

    def read(self, start: int, stop: int) -> AnyArray:
        values: AnyArray = E4M3[self.weight.read(start, stop)]
        rows, columns = (min(block or size, size) for size, block in zip(self.shape, self.block, strict=True))
        first = start // rows
        scales = _scale_values(replace(self.scales, shape=self.num_blocks), first, -(-stop // rows))
        by_row = scales[np.arange(start, stop) // rows - first]
        with np.errstate(invalid="ignore", over="ignore", under="ignore"):
            values *= np.repeat(by_row, columns, axis=1)[:, : self.shape[1]]
        return values


def _scale_values(scales: CheckpointTensor, start: int, stop: int) -> Float32Array:
    rows = scales.read(start, stop)
    if scales.dtype == "BF16":
        return widen(rows)
    return E8M0[rows] if scales.dtype in ("F8_E8M0", "U8") else rows.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Fp8Experts:
    """Matrices of 8-bit numbers (experts, rows, columns), each with the scales of a `Fp8Matrix`."""

    weight: CheckpointTensor
    scales: CheckpointTensor
    block: tuple[int, int]
    dtype: str = "F32"

    @property
    def path(self) -> Path:
        return self.weight.path

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def expert(self, number: int) -> Fp8Matrix:
        """The matrix of one expert."""
        return Fp8Matrix(_of_expert(self.weight, number), _of_expert(self.scales, number), self.block)

    def scales_fit(self) -> bool:
        """Whether every expert has one scale per block."""
        return len(self.shape) == 3 and self.scales.shape[:1] == self.shape[:1] and self.expert(0).scales_fit()

    def read(self, start: int, stop: int) -> AnyArray:
        return np.stack([self.expert(number).read(0, self.shape[1]) for number in range(start, stop)])


def _of_expert(whole: CheckpointTensor, number: int) -> CheckpointTensor:
    return replace(whole, shape=whole.shape[1:], offset=whole.offset + number * whole.row_bytes)


@dataclass(frozen=True, slots=True)
class Mxfp4Experts:
    """Matrices (experts, outputs, inputs) of 4-bit numbers, two per byte, one power of two per 32 (OCP MX, 2023)."""

    blocks: CheckpointTensor
    scales: CheckpointTensor
    dtype: str = "F32"

    @property
    def path(self) -> Path:
        return self.blocks.path

    @property
    def name(self) -> str:
        return self.blocks.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.blocks.shape[:2], self.blocks.shape[2] * MXFP4_BLOCK)

    def scales_fit(self) -> bool:
        """Whether there is one exponent per block."""
        sizes = self.blocks.shape
        return len(sizes) == 4 and sizes[3] == MXFP4_BLOCK // 2 and self.scales.shape == sizes[:3]

    def read(self, start: int, stop: int) -> AnyArray:
        pairs = self.blocks.read(start, stop)
        values = np.empty((*pairs.shape[:3], MXFP4_BLOCK), np.float32)
        values[..., 0::2], values[..., 1::2] = E2M1[pairs & 15], E2M1[pairs >> 4]
        exponents = self.scales.read(start, stop).astype(np.int32) - MXFP4_BIAS
        with np.errstate(over="ignore"):
            np.ldexp(values, exponents[..., None], out=values)
        return values.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True, slots=True)
class FusedExpert:
    """Some `outputs` of one expert of a fused tensor.

    The fused tensor holds the expert's matrix as (outputs, inputs), or as (inputs, outputs) if `transposed`, and its
    bias as (outputs,).
    """

    whole: CheckpointTensor | Fp8Experts | Mxfp4Experts
    expert: int
    outputs: slice
    transposed: bool

    @property
    def path(self) -> Path:
        return self.whole.path

    @property
    def name(self) -> str:
        return self.whole.name

    @property
    def dtype(self) -> str:
        return self.whole.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        outputs, *inputs = self.whole.shape[:0:-1] if self.transposed else self.whole.shape[1:]
        return (len(range(outputs)[self.outputs]), *inputs)

    def read(self, start: int, stop: int) -> AnyArray:
        matrix = self.whole.read(self.expert, self.expert + 1)[0]
        by_output = matrix.T if self.transposed else matrix
        return np.ascontiguousarray(by_output[self.outputs][start:stop])
