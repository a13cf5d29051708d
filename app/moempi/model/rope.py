"""Rotary position embedding (Su et al. 2021): frequencies and angles."""

import math
from functools import cache

import numpy as np
from msgspec.structs import replace

from moempi.arrays import Float32Array, IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.config.architecture import AttentionShape, LongRope, Rope, Yarn


def rope_angles(backend: Backend, attention: AttentionShape, positions: IntArray, capacities: IntArray) -> Array:
    """Angles of the rows at `positions` (T,), for `Backend.rotate`.

    `capacities` (T,) are the positions that the row's sequence may have. They decide whether it is a long one, so that
    all its keys are rotated alike.
    """
    rope = attention.rope
    dim = rope.dim or (attention.latent.rope_dim if attention.latent else attention.head_dim)
    if rope.long is None:
        return _angles(backend, rope, positions, dim)
    is_long = capacities > rope.long.original_positions
    borders = np.flatnonzero(np.diff(is_long)) + 1
    parts = [
        _angles(backend, _of_long(rope, rope.long) if rows.any() else rope, part, dim)
        for part, rows in zip(np.split(positions, borders), np.split(is_long, borders), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return tuple(backend.join(arrays) for arrays in zip(*parts, strict=True))


def _angles(backend: Backend, rope: Rope, positions: IntArray, dim: int) -> Array:
    return backend.rope_angles(positions, frequencies=frequencies(rope, dim=dim), amplitude=rope.amplitude)


@cache
def _of_long(rope: Rope, long: LongRope) -> Rope:
    return replace(rope, divisors=long.divisors, amplitude=long.amplitude, long=None)


@cache
def frequencies(rope: Rope, *, dim: int) -> Float32Array:
    """theta^(-2i / dim) for i = 0 .. dim / 2 - 1, rescaled by `rope`; float32, the precision used in training.

    All are 0 if nothing is rotated. Each step needs them, so they are computed once; read-only. Powers are rounded from
    double precision: those of NumPy in float32 differ between processors.
    """
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    periods = np.array([math.pow(np.float32(rope.theta), exponent) for exponent in exponents.tolist()], np.float32)
    if rope.divisors:
        periods = periods * np.array(rope.divisors, np.float32)
    plain: Float32Array = (np.float32(1) / periods).astype(np.float32)
    result = plain if rope.yarn is None else _interpolated(plain, periods, rope.yarn, theta=rope.theta)
    if rope.none:
        result *= np.float32(0)
    result.flags.writeable = False
    return result


def _interpolated(plain: Float32Array, periods: Float32Array, yarn: Yarn, *, theta: float) -> Float32Array:
    """YaRN: keep fast frequencies, divide slow ones by the factor, ramp in between (Peng et al. 2023, section 3.2)."""
    dim = 2 * len(plain)
    low, high = (
        dim * math.log(yarn.original_positions / (2 * math.pi * rotations)) / (2 * math.log(theta))
        for rotations in (yarn.beta_fast, yarn.beta_slow)
    )
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    index = np.arange(len(plain), dtype=np.float32)
    kept = 1 - np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)
    slow = np.float32(1) / (np.float32(yarn.factor) * periods)
    mixed: Float32Array = (slow * (1 - kept) + plain * kept).astype(np.float32)
    return mixed
