"""Random values in a device's memory: one random page, which the device copies until an array is full."""

from math import prod

import numpy as np

from moempi.arrays import narrow
from moempi.backend.cuda.device import Device
from moempi.backend.protocol import Array

PAGE_NUMBERS = 1_000_008
"""Numbers of the page: whole 16-byte words, and no divisor or multiple of a usual width."""


class RandomValues:
    """Normally distributed bfloat16 values; equal arguments give equal values."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pages: dict[float, Array] = {}

    def rows(self, *shape: int, deviation: float = 1.0) -> Array:
        """A new array with this standard deviation."""
        out = self._device.empty(shape, np.uint16)
        self.fill(out, deviation=deviation)
        return out

    def fill(self, out: Array, *, deviation: float = 1.0) -> None:
        """Overwrite a contiguous array; does not block."""
        if deviation not in self._pages:
            numbers = np.random.default_rng(0).standard_normal(PAGE_NUMBERS, np.float32) * np.float32(deviation)
            self._pages[deviation] = self._device.upload(narrow(numbers))
        flat, size = out.reshape(-1), prod(out.shape)
        done = min(size, PAGE_NUMBERS)
        self._device.copy(self._pages[deviation][:done], flat[:done])
        while done < size:
            more = min(done, size - done)
            self._device.copy(flat[:more], flat[done : done + more])
            done += more
