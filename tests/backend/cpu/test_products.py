"""Products in NumPy, and those of the processor's own bfloat16 instructions ("fast")."""

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.cpu import packed_matrix
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import load_kernels
from moempi.backend.cpu.packed_matrix import PackedMatrix, pack_matrix, packing_works
from moempi.backend.protocol import Expert

needs_kernel = pytest.mark.skipif(not packing_works(), reason="no AVX512-BF16 or no C compiler")


def values(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


@needs_kernel
def test_fast_products_are_chosen_for_bfloat16_weights_and_equal_the_exact_ones_within_rounding():
    x, weight, bias = values(5, 24), narrow(values(10, 24, seed=1)), values(10, seed=2)
    exact = CompiledBackend(load_kernels(), precision="bfloat16")
    fast = CompiledBackend(load_kernels(), precision="bfloat16", fast_products=True)
    assert isinstance(fast.matrix(weight), PackedMatrix)
    assert not isinstance(fast.matrix(widen(weight)), PackedMatrix)
    assert not isinstance(exact.matrix(weight), PackedMatrix)
    in_float32 = CompiledBackend(load_kernels(), precision="float32", fast_products=True)
    assert not isinstance(in_float32.matrix(weight), PackedMatrix)
    for given in (None, bias):
        results = [backend.linear(x, backend.matrix(weight), given) for backend in (fast, exact)]
        np.testing.assert_allclose(*results, rtol=2.0**-7, atol=2e-2)
    experts = [
        [Expert(backend.matrix(narrow(values(16, 24, seed=3))), backend.matrix(narrow(values(24, 8, seed=4))))]
        for backend in (fast, exact)
    ]
    outputs = [b.expert_mlp(x, e, np.array([5])) for b, e in zip((fast, exact), experts, strict=True)]
    np.testing.assert_allclose(*outputs, rtol=2.0**-6, atol=5e-2)
    logits = [backend.logits(x, backend.matrix(weight)) for backend in (fast, exact)]
    np.testing.assert_allclose(*logits, atol=1e-4)


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (25, 70), (300, 129)])
@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 40, 500])
def test_the_kernel_multiplies_and_a_row_does_not_depend_on_other_rows(shape, rows):
    inputs, outputs = shape
    x, stored = values(rows, inputs), narrow(values(outputs, inputs, seed=1))
    exact = x.astype(np.float64) @ widen(stored).astype(np.float64).T
    matrix = pack_matrix([stored[:1], stored[1:]], transposed=False)
    transposed = pack_matrix([stored.T], transposed=True)
    options = {"most_rows": 200, "progress": lambda: None}
    product = matrix.product(x, rounded=False, **options)
    np.testing.assert_allclose(product, exact, atol=1e-5 * max(1.0, np.abs(exact).max(initial=0)))
    np.testing.assert_array_equal(product, transposed.product(x, rounded=False, **options))
    np.testing.assert_array_equal(round_to_bfloat16(product), matrix.product(x, rounded=True, **options))
    for row in range(0, rows, 7):
        np.testing.assert_array_equal(matrix.product(x[row : row + 1], rounded=False, **options)[0], product[row])


def test_without_a_compiler_there_is_no_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    packed_matrix._kernel.cache_clear()
    try:
        assert not packing_works()
    finally:
        packed_matrix._kernel.cache_clear()
