"""Sources of a tensor's values: a checkpoint's tensor, or what is computed from other sources while it is read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from moempi.arrays import Float32Array, widen
from moempi.errors import DataError
from moempi.storage.checkpoint import NUMPY_TYPES, CheckpointTensor
from moempi.storage.hdf5 import AnyArray


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


@dataclass(frozen=True, slots=True, eq=False)
class _Derived:
    """Rows that are computed from those of another source, whose file and name messages give."""

    of: Source

    @property
    def path(self) -> Path:
        return self.of.path

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def dtype(self) -> str:
        return "F32"


@dataclass(frozen=True, slots=True, eq=False)
class Unpacked(_Derived):
    """Numbers that are packed along the last axis, in bytes or little-endian words, which `table` says of a byte."""

    table: Float32Array

    @property
    def shape(self) -> tuple[int, ...]:
        *others, last = self.of.shape
        return (*others, last * NUMPY_TYPES[self.of.dtype].itemsize * (self.table.size // 256))

    def read(self, start: int, stop: int) -> AnyArray:
        numbers: AnyArray = self.table[self.of.read(start, stop).view(np.uint8)]
        return numbers.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class UnpackedRows(_Derived):
    """Rows of which `len(order)` are packed in one: row r of these is the number `order[r]` of each word."""

    table: Float32Array
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.of.shape[0] * len(self.order), *self.of.shape[1:])

    def read(self, start: int, stop: int) -> AnyArray:
        first, last = start // len(self.order), -(-stop // len(self.order))
        words = self.of.read(first, last)
        numbers = self.table[words.view(np.uint8)].reshape(*words.shape, len(self.order))
        rows = np.moveaxis(numbers[..., list(self.order)], -1, 1).reshape(-1, *words.shape[1:])
        return rows[start - first * len(self.order) :][: stop - start]


@dataclass(frozen=True, slots=True, eq=False)
class Transposed(_Derived):
    """The columns of a matrix as rows."""

    of: CheckpointTensor

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape[::-1]

    def read(self, start: int, stop: int) -> AnyArray:
        return np.ascontiguousarray(self.of.read_columns(start, stop).T)


@dataclass(frozen=True, slots=True, eq=False)
class Scaled(_Derived):
    """Numbers (rows, columns), or a stack of such, less a zero point and times a scale per block of `block`.

    A block size of 0 stands for all. `scales` and `zeros` are (row blocks, column blocks); `groups`, if any, has the
    column block of each column. With `divides`, scales divide. With `rounds`, values have the type of the scales.
    """

    scales: Source
    block: tuple[int, int]
    zeros: Source | None = None
    groups: CheckpointTensor | None = None
    divides: bool = False
    rounds: bool = False

    @property
    def dtype(self) -> str:
        return "F16" if self.rounds and self.scales.dtype == "F16" else "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def num_blocks(self) -> tuple[int, ...]:
        """The shape of the scales."""
        return num_blocks(self.shape, self.block)

    def read(self, start: int, stop: int) -> AnyArray:
        values: Float32Array = self.of.read(start, stop)
        column_blocks = self._column_blocks()
        if self.zeros is not None:
            values -= self._by_number(self.zeros, column_blocks, start, stop)
        scales = self._by_number(self.scales, column_blocks, start, stop)
        with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
            (np.divide if self.divides else np.multiply)(values, scales, out=values)
            return values.astype(np.float16) if self.dtype == "F16" else values

    def _by_number(self, blocks: Source, column_blocks: AnyArray | None, start: int, stop: int) -> AnyArray:
        """The scale or zero point of each number in rows [start, stop)."""
        *stacks, num_rows, num_columns = self.shape
        rows, columns = (min(size or length, length) for size, length in zip(self.block, self.shape[-2:], strict=True))
        if stacks:
            by_row = float_rows(blocks, start, stop).repeat(rows, axis=-2)[..., :num_rows, :]
        else:
            first = start // rows
            by_row = float_rows(blocks, first, -(-stop // rows))[np.arange(start, stop) // rows - first]
        if column_blocks is not None:
            return by_row[:, column_blocks]
        return np.repeat(by_row, columns, axis=-1)[..., :num_columns]

    def _column_blocks(self) -> AnyArray | None:
        if self.groups is None:
            return None
        found = self.groups.read(0, self.shape[1])
        if found.min() < 0 or found.max() >= self.num_blocks[1]:
            raise DataError(
                f"{self.groups.path}: {self.groups.name}: has groups beyond the {self.num_blocks[1]} scales"
            )
        return found


@dataclass(frozen=True, slots=True, eq=False)
class FusedExpert(_Derived):
    """Some `outputs` of one expert of a fused tensor.

    The fused tensor holds the expert's matrix as (outputs, inputs), or as (inputs, outputs) if `transposed`, and its
    bias as (outputs,).
    """

    expert: int
    outputs: slice
    transposed: bool

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        outputs, *inputs = self.of.shape[:0:-1] if self.transposed else self.of.shape[1:]
        return (len(range(outputs)[self.outputs]), *inputs)

    def read(self, start: int, stop: int) -> AnyArray:
        matrix = self.of.read(self.expert, self.expert + 1)[0]
        by_output = matrix.T if self.transposed else matrix
        return np.ascontiguousarray(by_output[self.outputs][start:stop])


@dataclass(frozen=True, slots=True, eq=False)
class GroupedRows(_Derived):
    """Rows [first, first + size) of each group of `group` rows; an axis of one number is left out after the rows."""

    group: int
    first: int
    size: int

    @property
    def dtype(self) -> str:
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        num_rows, *others = self.of.shape
        return (num_rows // self.group * self.size, *(others[1:] if len(others) == 2 and others[0] == 1 else others))

    def read(self, start: int, stop: int) -> AnyArray:
        parts = []
        for number in range(start // self.size, -(-stop // self.size)):
            begin, end = max(start - number * self.size, 0), min(stop - number * self.size, self.size)
            at = number * self.group + self.first
            parts.append(self.of.read(at + begin, at + end))
        rows = np.concatenate(parts) if parts else self.of.read(0, 0)
        return rows.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True, slots=True, eq=False)
class Increased(_Derived):
    """1 plus each number, rounded to float32."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def read(self, start: int, stop: int) -> AnyArray:
        return float_rows(self.of, start, stop) + np.float32(1)


def float_rows(source: Source, start: int, stop: int) -> Float32Array:
    """Rows of a source of floating-point numbers as float32; exact."""
    rows = source.read(start, stop)
    return widen(rows) if source.dtype == "BF16" else rows.astype(np.float32, copy=False)


def num_blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The number of blocks of a matrix, or of each matrix in a stack, along its two axes."""
    counts = (-(-length // max(size or length, 1)) for size, length in zip(block, shape[-2:], strict=True))
    return (*shape[:-2], *counts)
