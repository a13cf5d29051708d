"""Products of tiles (`run.products = "fast"`) have the bits of their definition, in any batch and on any threads.

The definition is compiled in the place of the processor's tiles where it has none, and beside them where it has some.
"""

import numpy as np
import pytest

from backend.cpu.guarded import guarded
from backend.cpu.tiled_kernels import tiled_kernels
from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.cpu import kernels
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import TILED, MatrixProduct, load_kernels
from moempi.backend.select import has_fast_products, make_backend
from moempi.config.job import RunSection

FLUSHED = 2.0**-126
"""The smallest normal number."""


CONTESTANTS = tiled_kernels()
needs_tiles = pytest.mark.skipif(not CONTESTANTS, reason="no C compiler, or a processor without AVX2")
each_kind = pytest.mark.parametrize("of", CONTESTANTS.values(), ids=CONTESTANTS)


@pytest.fixture(autouse=True)
def scratch_of_nans(monkeypatch):
    """The scratch memory of each product is new, all its numbers are none, and it ends at a page without access."""
    monkeypatch.setattr(kernels, "aligned_empty", lambda shape, dtype: guarded(np.full(shape, np.nan, dtype)))
    for of in (load_kernels(), *CONTESTANTS.values()):
        if of is not None:
            monkeypatch.setattr(of, "_scratch", np.empty(0, np.float32))


def values(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


def chain(x, weights):
    """Sums in float32, one product at a time; a product and its sum are exact in float64 for these numbers."""
    sums = np.zeros((len(x), len(weights)), np.float32)
    for k in range(x.shape[1]):
        exact = sums.astype(np.float64) + np.outer(x[:, k].astype(np.float64), weights[:, k].astype(np.float64))
        sums = np.where(np.abs(exact) < FLUSHED, 0, exact).astype(np.float32)
    return sums


def tiled_product(x, weights, bias):
    """For each chunk of 32 inputs in turn the chain of its even inputs and that of its odd ones are added."""
    sums = np.zeros((len(x), len(weights)), np.float32)
    for first in range(0, x.shape[1], 32):
        even, odd = (
            chain(x[:, first + half : first + 32 : 2], weights[:, first + half : first + 32 : 2]) for half in range(2)
        )
        sums += even + odd
    return sums + bias


def product(of, x, parts, bias, *, is_narrow=True, threads=1, rounded=False):
    of.use_threads(threads)
    matrix = of.pack(parts, transposed=False, tiled=True)
    out, of._scratch = np.empty((len(x), matrix.shape[1]), np.float32), np.empty(0, np.float32)
    of.multiply(x, [MatrixProduct(matrix, len(x), bias=bias)], out, narrow=is_narrow, rounded=rounded)
    return out


@needs_tiles
@each_kind
@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (31, 70), (33, 32), (300, 129), (1800, 33)])
@pytest.mark.parametrize("rows", [1, 16, 17, 21, 31, 32, 33, 530])
def test_products_have_the_bits_of_their_definition_for_any_rows_and_threads(of, shape, rows):
    inputs, outputs = shape
    x, stored, bias = values(rows, inputs), narrow(values(outputs, inputs, seed=1)), values(outputs, seed=2)
    twin = tiled_product(x, widen(stored), bias)
    whole = product(of, x, [stored[:1], stored[1:]], bias)
    np.testing.assert_array_equal(whole, twin)
    np.testing.assert_array_equal(product(of, x, [stored], bias, threads=3), twin)
    np.testing.assert_array_equal(product(of, x, [stored], bias, rounded=True), round_to_bfloat16(twin))
    np.testing.assert_array_equal(product(of, x[-1:], [stored], bias), twin[-1:])


@needs_tiles
@each_kind
@pytest.mark.parametrize("rows", [1, 21, 40])
def test_several_products_of_a_call_have_their_definition_each(of, rows):
    """Each head has a matrix of its own; the rows of a head are apart."""
    backend, stored = CompiledBackend(of, precision="bfloat16", tiled=True), narrow(values(3, 70, 37, seed=1))
    matrices, x = backend.head_matrices(stored), values(rows, 5, 3, 70)
    assert {matrix.weights for matrix in matrices} == {TILED}
    twin = np.stack([tiled_product(x[:, 2, head], widen(stored[head].T), np.float32(0)) for head in range(3)], axis=1)
    for each in (x[:, 2], np.ascontiguousarray(x[:, 2]), x[:, 2].transpose(1, 2, 0).copy().transpose(2, 0, 1)):
        np.testing.assert_array_equal(backend.linear_heads(each, matrices), round_to_bfloat16(twin))


@needs_tiles
@each_kind
@pytest.mark.parametrize("rows", [2, 31])
def test_rows_that_are_apart_and_heads_that_are_cut_have_the_bits_of_the_definition(of, rows):
    backend, stored, bias = CompiledBackend(of, precision="bfloat16", tiled=True), values(130, 70, seed=1), values(130)
    head, x = backend.matrix(narrow(stored)), values(rows, 200)[:, 60:130]
    twin = tiled_product(x, stored, bias)
    for each in (x, np.ascontiguousarray(x), np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
        np.testing.assert_array_equal(backend.logits(each, head, bias), twin)
    for outputs in (range(32), range(32, 64), range(32, 130), range(64, 101), range(128, 130)):
        part, some = backend.take_outputs(head, outputs), slice(outputs.start, outputs.stop)
        np.testing.assert_array_equal(backend.logits(x, part, bias[some]), twin[:, some])


@needs_tiles
@each_kind
def test_subnormal_numbers_count_as_zero(of):
    """Of an input, of a product, and of a sum of normal products."""
    x = np.float32([[2.0**-130, 0, 1], [2.0**-70, 0, 0], [-(2.0**-63), 0, 2.0**-63]])
    stored = narrow(np.float32([[1, 0, 0], [2.0**-60, 0, 1], [2.0**-63, 0, 2.0**-63 * (1 + 2.0**-7)]]))
    found = product(of, x, [stored], np.zeros(3, np.float32))
    assert found[[0, 1, 2], [0, 1, 2]].tolist() == [0, 0, 0]


@needs_tiles
@each_kind
def test_numbers_that_are_none_stay_in_their_row(of):
    x, stored = values(40, 64), narrow(values(40, 64, seed=1))
    x[3, 5], x[20, 7] = np.nan, np.inf
    found = product(of, x, [stored], np.zeros(40, np.float32))
    assert np.isnan(found[3]).all()
    assert np.isinf(found[20]).all()
    others = np.delete(np.arange(40), [3, 20])
    np.testing.assert_array_equal(found[others], product(of, x[others], [stored], np.zeros(40, np.float32)))


@needs_tiles
@each_kind
def test_only_bfloat16_weights_and_rows_use_tiles(of):
    """A row of float32 values, and weights in float32, have the exact product."""
    x = np.round(np.random.default_rng(0).standard_normal((7, 64)) * 4096).astype(np.float32) / 4096
    stored, bias = narrow(values(40, 64, seed=1)), np.zeros(40, np.float32)
    assert of.pack([stored], transposed=False, tiled=True).weights == TILED
    exact = product(load_kernels(), x, [widen(stored)], bias, is_narrow=False)
    np.testing.assert_array_equal(product(of, x, [stored], bias, is_narrow=False), exact)
    np.testing.assert_array_equal(
        product(of, round_to_bfloat16(x), [widen(stored)], bias)[:1],
        product(load_kernels(), round_to_bfloat16(x[:1]), [widen(stored)], bias),
    )


@needs_tiles
def test_a_backend_uses_tiles_if_the_run_asks_for_them_and_the_processor_has_them():
    fast, exact = (RunSection(backend="numpy", products=products) for products in ("fast", "exact"))
    backends = [make_backend(run, local_rank=0, device_buffers=False) for run in (fast, exact)]
    assert all(isinstance(backend, CompiledBackend) for backend in backends)
    kinds = [backend.matrix(narrow(values(4, 8))).weights == TILED for backend in backends]
    assert kinds == ["AMX" in CONTESTANTS, False]
    assert has_fast_products(fast) == ("AMX" in CONTESTANTS)
    assert not has_fast_products(exact)
    assert not has_fast_products(RunSection(backend="numpy", products="fast", precision="float32"))
