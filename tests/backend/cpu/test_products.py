"""Products in NumPy, and those of the processor's own bfloat16 instructions ("fast")."""

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import BFLOAT16, FLOAT32, PAIRS, MatrixProduct, load_kernels
from moempi.backend.protocol import Expert

KERNELS = load_kernels(pairs=True)
needs_pairs = pytest.mark.skipif(not (KERNELS and KERNELS.has_pairs), reason="no AVX512-BF16 or no C compiler")


def values(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


@needs_pairs
def test_fast_products_are_chosen_for_bfloat16_weights_and_equal_the_exact_ones_within_rounding():
    x, weight, bias = values(5, 24), narrow(values(10, 24, seed=1)), values(10, seed=2)
    exact = CompiledBackend(load_kernels(), precision="bfloat16")
    fast = CompiledBackend(KERNELS, precision="bfloat16", fast_products=True)
    assert fast.matrix(weight).weights == PAIRS
    assert fast.matrix(widen(weight)).weights == FLOAT32
    assert exact.matrix(weight).weights == BFLOAT16
    in_float32 = CompiledBackend(KERNELS, precision="float32", fast_products=True)
    assert in_float32.matrix(weight).weights == BFLOAT16
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


@needs_pairs
@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (25, 70), (300, 129), (1800, 33)])
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 40, 500])
def test_fast_products_of_a_row_do_not_depend_on_other_rows_and_threads(shape, rows):
    inputs, outputs = shape
    x, stored, bias = values(rows, inputs), narrow(values(outputs, inputs, seed=1)), values(outputs, seed=2)
    exact = x.astype(np.float64) @ widen(stored).astype(np.float64).T + bias
    matrix = KERNELS.pack([stored[:1], stored[1:]], transposed=False, pairs=True)

    def product(x, *, threads=1, rounded=False):
        KERNELS.use_threads(threads)
        out = np.empty((len(x), outputs), np.float32)
        KERNELS.multiply(x, [MatrixProduct(matrix, len(x), bias=bias)], out, rounded=rounded)
        return out

    whole = product(x)
    np.testing.assert_allclose(whole, exact, atol=1e-5 * max(1.0, np.abs(exact).max(initial=0)))
    np.testing.assert_array_equal(product(x, threads=3), whole)
    np.testing.assert_array_equal(product(x, rounded=True), round_to_bfloat16(whole))
    for row in range(0, rows, 7):
        np.testing.assert_array_equal(product(x[row : row + 1])[0], whole[row])


def test_without_a_compiler_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load_kernels.__wrapped__() is None
