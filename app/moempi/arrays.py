"""Host arrays: bfloat16 carried as uint16 bits (the upper half of a float32), aligned memory, numbers or arrays."""

import ctypes
from collections.abc import Callable
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
_FIRST_BYTE: Callable[[Any], ctypes.c_char] = ctypes.c_char.from_buffer


def larger(one: float, other: float) -> float:
    """The larger of two numbers; of arrays (n,), n of them."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.maximum(one, other)
    return one if one >= other else other


def smaller(one: float, other: float) -> float:
    """The smaller of two numbers; of arrays (n,), n of them."""
    return -larger(-one, -other)


def where(condition: bool, one: float, other: float) -> float:
    """One number if a condition holds, else another; of arrays (n,), n of them."""
    if isinstance(condition, np.ndarray):
        return np.where(condition, one, other)
    return one if condition else other


def widen(bits: Bits, out: Float32Array | None = None) -> Float32Array:
    """Convert bfloat16 bits to float32 values; exact."""
    result = np.empty(bits.shape, np.float32) if out is None else out
    np.left_shift(bits, 16, out=result.view(np.uint32), dtype=np.uint32, casting="unsafe")
    return result


def narrow(values: Float32Array, out: Bits | None = None) -> Bits:
    """Round float32 values to bfloat16 bits, ties to even; a NaN that arithmetic produces stays NaN."""
    rounded = _rounded_bits(values)
    rounded >>= 16
    if out is None:
        return rounded.astype(np.uint16)
    np.copyto(out, rounded, casting="unsafe")
    return out


def round_to_bfloat16(values: Float32Array) -> Float32Array:
    """Round float32 values to bfloat16 values, ties to even."""
    rounded = _rounded_bits(values)
    rounded &= np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _rounded_bits(values: Float32Array) -> npt.NDArray[Any]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> 16
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    return rounded


def is_finite(bits: npt.NDArray[Any]) -> bool:
    """Whether contiguous bfloat16 bits hold no infinity and no NaN."""
    flat = bits.reshape(-1)
    for start in range(0, flat.size, _CHECKED_AT_ONCE):
        if (flat[start : start + _CHECKED_AT_ONCE] & 0x7FFF).max() >= INFINITY_BITS:
            return False
    return True


def aligned_empty(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Allocate an uninitialised C-ordered array aligned to 64 bytes; copies between aligned arrays are fastest."""
    num_bytes = prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(num_bytes + ALIGNMENT_BYTES, np.uint8)
    skip = -address_of(memory) % ALIGNMENT_BYTES
    aligned: npt.NDArray[Any] = memory[skip : skip + num_bytes].view(dtype).reshape(shape)
    return aligned


def aligned_rows(rows: int, *, row_bytes: int) -> npt.NDArray[np.uint8]:
    """Allocate uninitialised memory for `rows` rows of `row_bytes` bytes each, aligned like `aligned_empty`."""
    return aligned_empty((rows, row_bytes), np.uint8)


def address_of(array: npt.NDArray[Any]) -> int:
    """The address of an array's first number."""
    try:
        return ctypes.addressof(_FIRST_BYTE(array))  # takes a fifth of the time of NumPy's own ways
    except (TypeError, ValueError, BufferError):  # an array that is read-only, empty or not contiguous
        address: int = array.__array_interface__["data"][0]
        return address
