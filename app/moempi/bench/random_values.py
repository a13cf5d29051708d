"""Random values in a device's memory: one random page, which the device copies until an array is full."""

from math import prod

import numpy as np

from moempi.arrays import narrow
from moempi.backend.cuda.device import Device
from moempi.backend.cuda.products import Matrix
from moempi.backend.values import Array, Expert
from moempi.bench.random_layer import WEIGHT_DEVIATION, Sizes
from moempi.config.architecture import Router
from moempi.model.feed_forward import MixtureOfExperts

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


def random_matrix(values: RandomValues, outputs: int, inputs: int) -> Matrix:
    """Random weights (outputs, inputs)."""
    return Matrix(values.rows(outputs, inputs, deviation=WEIGHT_DEVIATION), False)


def random_expert(values: RandomValues, sizes: Sizes) -> Expert:
    """An expert with random weights."""
    width, hidden = sizes.width, sizes.expert_width
    return Expert(random_matrix(values, 2 * hidden, width), random_matrix(values, width, hidden))


def random_layer(values: RandomValues, sizes: Sizes, *, num_hosted: int) -> MixtureOfExperts:
    """A MoE layer on a rank that hosts `num_hosted` of its experts."""
    experts = [random_expert(values, sizes) for _ in range(num_hosted)]
    rule = Router(top_k=sizes.top_k, renormalize=True)
    router = random_matrix(values, sizes.num_experts, sizes.width)
    return MixtureOfExperts(layer=0, rule=rule, router=router, experts=experts)
