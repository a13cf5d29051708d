"""Bfloat16 matrices for processors with bfloat16 products (AVX512-BF16), by a kernel compiled on first use.

If the kernel cannot be compiled (see `c_compiler`), or on another processor, no matrix is packed and NumPy computes the
products.
"""

import ctypes
import logging
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moempi.arrays import Bits, Float32Array, aligned_empty
from moempi.backend.c_compiler import load_kernel

SOURCE = Path(__file__).with_name("bf16_product.c")
PANEL = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A matrix (inputs, outputs) in the panels of bf16_product.c."""

    packed: Bits
    shape: tuple[int, int]

    def product(self, x: Float32Array, *, rounded: bool, most_rows: int, progress: Callable[[], None]) -> Float32Array:
        """Multiply x (T, inputs) of bfloat16 values by the matrix, in calls of `most_rows` rows -> (T, outputs).

        Calls `progress` after each call. The bits of a row do not depend on the other rows. If `rounded`, the result is
        rounded to bfloat16 values.
        """
        inputs, outputs = self.shape
        x = np.ascontiguousarray(x)
        result = np.empty((len(x), outputs), np.float32)
        pairs = np.empty((min(len(x), most_rows), (inputs + 1) // 2), np.uint32)
        for first in range(0, len(x), most_rows):
            rows = x[first : first + most_rows]
            arrays = (rows, pairs, self.packed, result[first:])
            _kernel().product(*(array.ctypes.data for array in arrays), len(rows), inputs, outputs, int(rounded))
            progress()
        return result


def packing_works() -> bool:
    """Whether this machine has the instructions and the compiled kernel."""
    return _kernel() is not None


def pack_matrix(parts: Sequence[Bits], *, transposed: bool) -> PackedMatrix:
    """Pack stored (outputs, inputs) matrices, joined along the outputs; transposed ones are (inputs, outputs)."""
    inputs = parts[0].shape[0 if transposed else 1]
    outputs = sum(part.shape[1 if transposed else 0] for part in parts)
    packed = aligned_empty((-(-outputs // PANEL), (inputs + 1) // 2, PANEL, 2), np.uint16)
    packed[:] = 0
    first = 0
    for part in parts:
        part = np.ascontiguousarray(part)
        count = part.shape[1 if transposed else 0]
        _kernel().pack(part.ctypes.data, packed.ctypes.data, inputs, count, first, int(transposed))
        first += count
    return PackedMatrix(packed, (inputs, outputs))


@cache
def _kernel() -> Any:
    """Returns None if the library cannot be loaded or the processor lacks the instructions."""
    if platform.machine() != "x86_64":
        return None
    library = load_kernel(SOURCE)
    if library is None:
        return None
    pointer, count, flag = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    library.pack.argtypes = [pointer, pointer, count, count, count, flag]
    library.product.argtypes = [pointer, pointer, pointer, pointer, count, count, count, flag]
    library.pack.restype = library.product.restype = None
    if not library.supported():
        log.info("matrices are not packed: the processor has no AVX512-BF16")
        return None
    return library
