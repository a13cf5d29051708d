"""What each of the 256 bytes stands for in the number formats of quantized checkpoints, as float32.

A table of shape (256,) has one number per byte, of shape (256, 2) two of 4 bits, the lower half of the byte first.
"""

import numpy as np

from moempi.arrays import Float32Array

E8M0_NAN = 255
_BYTES = np.arange(256)
_HALVES = np.stack([_BYTES & 15, _BYTES >> 4], axis=1)


def _e4m3_values() -> Float32Array:
    """float8 e4m3fn: sign, 4 exponent bits with bias 7, 3 fraction bits; NaN but no infinity."""
    exponent, fraction = _BYTES >> 3 & 15, (_BYTES & 7) / 8
    values = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7))
    values[_BYTES & 127 == 127] = np.nan
    return np.where(_BYTES < 128, values, -values).astype(np.float32)


def _e8m0_values() -> Float32Array:
    """float8 e8m0: powers of two with bias 127, and NaN (OCP Microscaling Formats, 2023)."""
    with np.errstate(over="ignore"):
        values = np.ldexp(np.float32(1), _BYTES - 127)
    values[E8M0_NAN] = np.nan
    return values


def _e2m1_values() -> Float32Array:
    """float4 e2m1: sign, 2 exponent bits, 1 fraction bit (OCP Microscaling Formats, 2023)."""
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([positive, -positive])[_HALVES]


E4M3 = _e4m3_values()
E8M0 = _e8m0_values()
E2M1 = _e2m1_values()
SIGNED = _BYTES.astype(np.uint8).view(np.int8).astype(np.float32)


def integers(bits: int, *, offset: int = 0, zero: int = 0) -> Float32Array:
    """Unsigned integers of 4 or 8 bits plus `offset`, modulo 2^bits, less `zero`."""
    stored = _HALVES if bits == 4 else _BYTES
    return ((stored + offset) % (1 << bits) - zero).astype(np.float32)
