"""Rotary angles, and the rotation of rows that no cache takes: the launches of kernels/rope.cu for them."""

from math import prod

import numpy as np

from moempi.arrays import Float32Array, IntArray
from moempi.backend.cuda.attention import ROTATED_NUMBERS
from moempi.backend.cuda.host_copies import HostCopies
from moempi.backend.cuda.launches import Launches, extents
from moempi.backend.values import Array


class Rope:
    """The cosines and sines of a step's rows, and rotations by them."""

    def __init__(self, launches: Launches, copies: HostCopies) -> None:
        self._launches = launches
        self._copies = copies
        self._frequencies: dict[tuple[int, bytes], Array] = {}

    def angles(self, positions: IntArray, *, frequencies: Float32Array, amplitude: float) -> tuple[Array, Array]:
        """Cosines and sines (T, n), as `Backend.rope_angles`."""
        shape, empty = (len(positions), len(frequencies)), self._launches.empty
        cosines, sines = empty(shape, np.float32), empty(shape, np.float32)
        given = (self._copies.upload(positions), self._uploaded(frequencies), cosines, sines)
        grid = (-(-prod(shape) // 256), 1, 1)
        self._launches.launch("rope", "rope_angles", grid, 256, *given, *shape, amplitude)
        return cosines, sines

    def rotate(self, x: Array, angles: tuple[Array, Array], *, interleaved: bool = False) -> Array:
        """The rotated heads of x (T, H, dim)."""
        out = self._launches.rows(x.shape)
        heads, dim, *strides = extents(x)
        sizes = (heads, dim, angles[0].shape[1], *strides, interleaved)
        grid = (len(x), -(-prod(x.shape[1:]) // ROTATED_NUMBERS), 1)
        self._launches.launch("rope", "rotate", grid, 128, x, *angles, out, *sizes)
        return out

    def _uploaded(self, frequencies: Float32Array) -> Array:
        """The frequencies of a model, which each step needs; uploaded once for each queue, whose work is in order."""
        key = (self._launches.device.queue, frequencies.tobytes())
        if key not in self._frequencies:
            self._frequencies[key] = self._copies.upload(frequencies)
        return self._frequencies[key]
