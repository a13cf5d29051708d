"""Products of tiles (`run.products = "fast"`) have the bits of their definition, in any batch and on any threads.

The definition is compiled in the place of the processor's tiles where it has none, and beside them where it has some.
"""

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.c_compiler import load_kernel
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import (
    SOURCES,
    TILED,
    WITH_TILES,
    Kernels,
    MatrixProduct,
    compiler_flags,
    instructions,
    load_kernels,
)
from moempi.backend.select import has_fast_products, make_backend
from moempi.config.job import RunSection

FLUSHED = 2.0**-126
"""The smallest normal number."""


def defined(name):
    """Kernels whose tiles compute what the processor's are defined to compute, with other instructions."""
    library = load_kernel(SOURCES, (*compiler_flags(name), "-DTILES_AS_DEFINED"))
    kernels = None if library is None else Kernels(library)
    assert kernels is None or kernels.request_tiles()
    return kernels


WITH_AVX = [name for name in instructions() if name in ("AVX-512", "AVX2")]
CONTESTANTS = {f"{name}, as defined": defined(name) for name in WITH_AVX} if load_kernels() else {}
if WITH_TILES in instructions() and load_kernels(WITH_TILES) and load_kernels(WITH_TILES).request_tiles():
    CONTESTANTS["AMX"] = load_kernels(WITH_TILES)
needs_tiles = pytest.mark.skipif(not CONTESTANTS, reason="no C compiler, or a processor without AVX2")
each_kind = pytest.mark.parametrize("of", CONTESTANTS.values(), ids=CONTESTANTS)


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
    out = np.empty((len(x), matrix.shape[1]), np.float32)
    of.multiply(x, [MatrixProduct(matrix, len(x), bias=bias)], out, narrow=is_narrow, rounded=rounded)
    return out


@needs_tiles
@each_kind
@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (31, 70), (33, 32), (300, 129), (1800, 33)])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 33, 48, 530])
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
