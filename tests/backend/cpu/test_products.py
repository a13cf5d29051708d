"""Products in which a row does not depend on other rows: by trial of BLAS, and by the compiled kernel."""

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.cpu import blocked_product, packed_matrix
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cpu.blocked_product import BLOCK
from moempi.backend.cpu.packed_matrix import pack_matrix, packing_works

needs_kernel = pytest.mark.skipif(not packing_works(), reason="no AVX512-BF16 or no C compiler")


def values(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


def blocks_of_eight(x, matrix):
    padded = np.zeros((-(-len(x) // BLOCK) * BLOCK, x.shape[1]), np.float32)
    padded[: len(x)] = x
    return np.matmul(padded.reshape(-1, BLOCK, x.shape[1]), matrix).reshape(len(padded), matrix.shape[1])[: len(x)]


@pytest.mark.parametrize("shape", [(48, 40), (1024, 16), (256, 512)])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 17, 100, 300])
def test_every_row_has_the_bits_of_a_call_of_eight_rows(shape, rows):
    x, matrix = values(rows, shape[0]), values(*shape, seed=1)
    product = blocked_product.blocked_product(x, matrix, most_rows=128, progress=lambda: None)
    np.testing.assert_array_equal(product, blocks_of_eight(x, matrix))


@pytest.mark.parametrize("outputs", [1, 2, 3, 5])
def test_narrow_products_have_the_bits_of_a_row_whatever_the_number_of_rows(outputs):
    dice = np.random.default_rng(5)
    for inputs in (8, 24, 32, 44, 64):
        x, matrix = (dice.standard_normal(shape).astype(np.float32) for shape in ((70, inputs), (inputs, outputs)))
        blocks = blocks_of_eight(x, matrix)
        for rows in range(1, 71):
            found = blocked_product.blocked_product(x[:rows], matrix, most_rows=128, progress=lambda: None)
            np.testing.assert_array_equal(found, blocks[:rows], err_msg=f"{inputs} inputs, {rows} rows")


def test_a_blas_whose_bits_depend_on_the_number_of_rows_is_called_with_eight(monkeypatch):
    monkeypatch.setattr(blocked_product, "_gives_same_bits", lambda inputs, outputs, rows: rows == BLOCK)
    x, matrix = values(21, 48), values(48, 40, seed=1)
    product = blocked_product.blocked_product(x, matrix, most_rows=128, progress=lambda: None)
    np.testing.assert_array_equal(product, blocks_of_eight(x, matrix))


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


def test_without_the_kernel_matrices_are_float32(monkeypatch):
    monkeypatch.setattr(packed_matrix, "_kernel", lambda: None)
    backend = NumpyBackend(precision="bfloat16", reproducible=False)
    x, weight = values(5, 24), values(10, 24, seed=1)
    product = backend.linear(x, backend.matrix(narrow(weight)))
    np.testing.assert_allclose(product, x @ weight.T, rtol=2.0**-8, atol=1e-4)


def test_without_a_compiler_there_is_no_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    packed_matrix._kernel.cache_clear()
    try:
        assert not packing_works()
    finally:
        packed_matrix._kernel.cache_clear()
