"""Matrix products by the device's library.

The bits of a product depend on the number of rows of the call. `reproducible` products are therefore calls of
PRODUCT_ROWS rows each, the last one padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moempi.backend.cuda.launches import Launches, rows_from
from moempi.backend.values import Array

PRODUCT_ROWS = 64
PANEL_WIDTH = 64
"""Inputs of a panel of kernels/warpgroup.cuh."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix as stored: (outputs, inputs), or (inputs, outputs) when `transposed`."""

    values: Array
    transposed: bool
    has_panels: bool = field(init=False)
    """Whether kernels/few_rows.cu takes it: bfloat16 rows of whole panels."""

    def __post_init__(self) -> None:
        is_bfloat16, width = self.values.dtype == np.uint16, self.values.shape[-1]
        object.__setattr__(self, "has_panels", is_bfloat16 and not self.transposed and width % PANEL_WIDTH == 0)

    @property
    def outputs(self) -> int:
        """Width of a product with the matrix."""
        return int(self.values.shape[1 if self.transposed else 0])


class Products:
    """Products of rows with matrices."""

    def __init__(self, launches: Launches, *, reproducible: bool) -> None:
        self._launches = launches
        self._device = launches.device
        self._reproducible = reproducible

    def product(self, x: Array, matrix: Matrix, out: Array) -> None:
        """Compute out (T, N) = x (T, K) times the matrix."""
        if x.dtype != matrix.values.dtype:
            x = self._launches.widened(x)
        if self._takes_whole(x):
            self._device.product(x, matrix.values, out, transposed=matrix.transposed)
            return
        for first, count, is_whole in self._calls(len(x)):
            own, result = rows_from(x, first, count), rows_from(out, first, count)
            if is_whole:
                self._device.product(own, matrix.values, result, transposed=matrix.transposed)
            else:
                padded = self._launches.empty((PRODUCT_ROWS, *out.shape[1:]), out.dtype)
                self._device.product(self._padded(own), matrix.values, padded, transposed=matrix.transposed)
                self._launches.copy(padded[:count], result)

    def biased(self, x: Array, matrix: Matrix, bias: Array | None, out: Array) -> None:
        """Compute out (T, N) = x (T, K) times the matrix, plus the bias, rounded once.

        cuBLAS does not add the bias: it would round the product before.
        """
        if bias is None:
            self.product(x, matrix, out)
        else:
            product = self.in_float(x, matrix, None)
            self._launches.by_vector("elementwise", "round_biased", out, product, bias, out, matrix.outputs)

    def in_float(self, x: Array, matrix: Matrix, bias: Array | None) -> Array:
        """The product in float32, plus the bias."""
        out = self._launches.empty((len(x), matrix.outputs), np.float32)
        self.product(x, matrix, out)
        if bias is not None:
            self._launches.by_vector("elementwise", "add_bias", out, out, bias, matrix.outputs)
        return out

    def by_head(self, x: Array, matrices: Array, out: Array) -> None:
        """Compute out (T, H, N) = x (T, H, K) times matrices (H, K, N), head by head."""
        if self._takes_whole(x):
            self._device.products(x, matrices, out)
            return
        for first, count, is_whole in self._calls(len(x)):
            own, result = rows_from(x, first, count), rows_from(out, first, count)
            if is_whole:
                self._device.products(own, matrices, result)
            else:
                padded = self._launches.rows((PRODUCT_ROWS, *out.shape[1:]))
                self._device.products(self._padded(own), matrices, padded)
                self._launches.copy(padded[:count], result)

    def _takes_whole(self, x: Array) -> bool:
        """Whether one call takes all rows."""
        return not self._reproducible and len(x) > 0

    def _calls(self, num_rows: int) -> Iterator[tuple[int, int, bool]]:
        """The first row and the number of rows of each reproducible call, and whether it needs no padding."""
        for first in range(0, num_rows, PRODUCT_ROWS):
            count = min(PRODUCT_ROWS, num_rows - first)
            yield first, count, count == PRODUCT_ROWS

    def _padded(self, x: Array) -> Array:
        padded = self._launches.empty((PRODUCT_ROWS, *x.shape[1:]), x.dtype)
        self._launches.copy(x, padded[: len(x)])
        return padded
