"""Sources of a tensor's values: a checkpoint's tensor, a quantized tensor, or one expert of a fused tensor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from moempi.storage.checkpoint import CheckpointTensor
from moempi.storage.hdf5 import AnyArray

FP8_BLOCK = 128
MXFP4_BLOCK = 32
MXFP4_BIAS = 127


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


E4M3 = _e4m3_values()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix of 8-bit numbers with one scale per block of 128 x 128 (DeepSeek-V3, 2024, section 3.3)."""

    weight: CheckpointTensor
    scales: CheckpointTensor
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

    def scales_fit(self) -> bool:
        """Whether there is one float32 scale per block."""
        blocks = tuple(-(-size // FP8_BLOCK) for size in self.shape)
        return len(self.shape) == 2 and self.scales.shape == blocks and self.scales.dtype == "F32"

    def read(self, start: int, stop: int) -> AnyArray:
        values: AnyArray = E4M3[self.weight.read(start, stop)]
        first = start // FP8_BLOCK
        scales = self.scales.read(first, -(-stop // FP8_BLOCK))
        by_row = scales[np.arange(start, stop) // FP8_BLOCK - first]
        with np.errstate(invalid="ignore", over="ignore"):
            values *= np.repeat(by_row, FP8_BLOCK, axis=1)[:, : self.shape[1]]
        return values


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

    whole: CheckpointTensor | Mxfp4Experts
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
