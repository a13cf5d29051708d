"""Host arrays: bfloat16, the upper half of a float32 carried as uint16 bits, and aligned memory."""

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer[Any]]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Bits = npt.NDArray[np.uint16]
"""bfloat16 values as their bits."""

INFINITY_BITS = 0x7F80
ALIGNMENT_BYTES = 64
_CHECKED_AT_ONCE = 1 << 17


def widen(bits: npt.NDArray[np.uint16], out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
    """The float32 values of bfloat16 bits; exact."""
    result = np.empty(bits.shape, np.float32) if out is None else out
    np.left_shift(bits, 16, out=result.view(np.uint32), dtype=np.uint32, casting="unsafe")
    return result


def narrow(values: npt.NDArray[np.float32], out: npt.NDArray[np.uint16] | None = None) -> npt.NDArray[np.uint16]:
    """The bfloat16 bits nearest to float32 values, ties to even; NaN stays NaN for NaNs that arithmetic makes."""
    rounded = _rounded_bits(values)
    rounded >>= 16
    if out is None:
        return rounded.astype(np.uint16)
    np.copyto(out, rounded, casting="unsafe")
    return out


def round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The nearest float32 values that bfloat16 can hold, ties to even."""
    rounded = _rounded_bits(values)
    rounded &= np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _rounded_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    return rounded


def is_finite(bits: npt.NDArray[Any]) -> bool:
    """Whether none of these contiguous bfloat16 bits is an infinity or NaN."""
    flat = bits.reshape(-1)
    for start in range(0, flat.size, _CHECKED_AT_ONCE):
        if (flat[start : start + _CHECKED_AT_ONCE] & 0x7FFF).max() >= INFINITY_BITS:
            return False
    return True


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised C-ordered array that starts at a multiple of 64 bytes; copies between such are the fastest."""
    num_bytes = prod(shape) * np.dtype(dtype).itemsize
    room = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
    skip = -room.ctypes.data % ALIGNMENT_BYTES
    aligned: npt.NDArray[Any] = room[skip : skip + num_bytes].view(dtype).reshape(shape)
    return aligned


def aligned_rows(rows: int, *, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Memory for `rows` rows of `row_bytes` each, aligned like `aligned_empty`."""
    return aligned_empty((rows, row_bytes), np.uint8)
