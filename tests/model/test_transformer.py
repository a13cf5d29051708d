"""The residual sums of a layer: the bits of an addition before the norm, but no launch of their own in a MoE layer."""

from collections import Counter

import numpy as np
import pytest
from msgspec import structs

from engine.runs import SMALL, Run, requests_of
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cuda.backend import CudaBackend
from moempi.model.norm import Norm
from simt.device import SimtDevice


@pytest.mark.parametrize("kind", ["rms", "rms_float32", "layer"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_norm_of_a_sum_is_the_norm_after_an_addition(kind, precision):
    backend = NumpyBackend(precision=precision)
    numbers = np.random.default_rng(1).normal(size=(12, 7)).astype(np.float32)
    rows = backend.add(numbers, np.zeros_like(numbers))  # rounded to the precision
    x, y, norm = rows[:5], rows[5:10], Norm(kind, 1e-5, rows[10], rows[11] if kind == "layer" else None)
    total, normalized = norm.of_sum(backend, x, y)
    np.testing.assert_array_equal(total, backend.add(x, y))
    np.testing.assert_array_equal(normalized, norm(backend, backend.add(x, y)))


class CountingDevice(SimtDevice):
    """A SIMT device with the number of launches of each kernel."""

    def __init__(self):
        super().__init__()
        self.launches = Counter()

    def launch(self, kernel, *arguments, **options):
        self.launches[kernel.name] += 1
        super().launch(kernel, *arguments, **options)


@pytest.mark.parametrize("shared_width", [0, 8])
def test_a_moe_layer_launches_no_kernel_for_a_sum_alone(tmp_path, shared_width):
    device = CountingDevice()

    def make_backend(progress):
        return CudaBackend(device, precision="bfloat16", reproducible=False, progress=progress)

    experts = structs.replace(SMALL.experts, shared_width=shared_width)
    architecture = structs.replace(SMALL, dense_layers=(), experts=experts)
    run = Run(tmp_path, requests_of(5, limit=1), architecture=architecture, make_backend=make_backend)
    run.lanes.run()
    run.journal.close()
    layers = architecture.num_layers
    assert device.launches["add_rms_norm"] == layers
    assert device.launches["combine_rms_norm"] == layers - 1
    assert device.launches["combine"] == 1  # of the last layer
    assert device.launches["rms_norm"] == 2  # of the first layer, and before the head
    assert device.launches["add"] == 0
