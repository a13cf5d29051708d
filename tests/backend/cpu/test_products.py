"""The product kernel has the bits of its chain of multiply-adds, whatever the instructions."""

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.cpu import kernels
from moempi.backend.cpu.kernels import (
    BFLOAT16,
    WITH_PAIRS,
    WITH_TILES,
    MatrixProduct,
    instructions,
    load_kernels,
)

KERNELS = load_kernels()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason="no C compiler, or a processor without kernels")
FLUSHED = 2.0**-126
"""The smallest normal number."""


@pytest.mark.skipif(not (shutil.which("cc") and instructions()), reason="no C compiler, or a processor without kernels")
def test_the_kernels_compile_where_there_is_a_compiler():
    """Where they do not, all other tests of them are skipped."""
    assert KERNELS is not None


def values(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


def chain(x, weights, bias):
    """The sums in float32, one product at a time; a product and its sum are exact in float64 for these numbers."""
    sums = np.zeros((len(x), len(weights)), np.float32)
    for k in sorted(range(x.shape[1]), key=lambda k: (k // 2, -k)):
        exact = sums.astype(np.float64) + np.outer(x[:, k].astype(np.float64), weights[:, k].astype(np.float64))
        sums = np.where(np.abs(exact) < FLUSHED, 0, exact).astype(np.float32)
    return sums + bias


def product(of, x, parts, bias, *, is_narrow, threads=1, rounded=False):
    of.use_threads(threads)
    matrix = of.pack(parts, transposed=False)
    out = np.empty((len(x), matrix.shape[1]), np.float32)
    of.multiply(x, [MatrixProduct(matrix, len(x), bias=bias)], out, narrow=is_narrow, rounded=rounded)
    return out


@needs_kernels
@pytest.mark.parametrize("name", instructions())
@pytest.mark.parametrize("shape", [(1, 1), (2, 64), (25, 70), (300, 129), (1800, 33)])
@pytest.mark.parametrize("rows", [1, 5, 12, 13, 40, 500])
def test_products_have_the_bits_of_the_chain_for_any_rows_and_threads(name, shape, rows):
    inputs, outputs = shape
    of = load_kernels(name)
    x, stored, bias = values(rows, inputs), narrow(values(outputs, inputs, seed=1)), values(outputs, seed=2)
    twin = chain(x, widen(stored), bias)
    for is_narrow in (False, True):
        whole = product(of, x, [stored[:1], stored[1:]], bias, is_narrow=is_narrow)
        np.testing.assert_array_equal(whole, twin)
        np.testing.assert_array_equal(product(of, x, [stored], bias, is_narrow=is_narrow, threads=3), whole)
        rounded = product(of, x, [stored], bias, is_narrow=is_narrow, rounded=True)
        np.testing.assert_array_equal(rounded, round_to_bfloat16(whole))
    np.testing.assert_array_equal(product(of, x, [widen(stored)], bias, is_narrow=False), twin)


@needs_kernels
@pytest.mark.parametrize("name", instructions())
def test_float32_rows_keep_their_low_bits_with_bfloat16_weights(name):
    x = np.round(np.random.default_rng(0).standard_normal((7, 33)) * 4096).astype(np.float32) / 4096
    stored, bias = narrow(values(40, 33, seed=1)), np.zeros(40, np.float32)
    found = product(load_kernels(name), x, [stored], bias, is_narrow=False)
    np.testing.assert_array_equal(found, chain(x, widen(stored), bias))


@needs_kernels
@pytest.mark.parametrize("name", instructions())
@pytest.mark.parametrize("is_narrow", [False, True])
def test_subnormal_numbers_count_as_zero(name, is_narrow):
    """Of an input, of a product, and of a sum of normal products."""
    x = np.float32([[2.0**-130, 1], [2.0**-70, 0], [-(2.0**-63), 2.0**-63]])
    stored = narrow(np.float32([[1, 0], [2.0**-60, 1], [2.0**-63, 2.0**-63 * (1 + 2.0**-7)]]))
    found = product(load_kernels(name), x, [stored], np.zeros(3, np.float32), is_narrow=is_narrow)
    assert found[0, 0] == 0
    assert found[1, 1] == 0
    assert found[2, 2] == 0
    assert np.float32(2.0**-130) * np.float32(1) > 0  # only inside the kernel


@needs_kernels
@pytest.mark.parametrize(("are_chains", "are_faster", "used"), [(1, 1, 1), (1, 0, 0), (0, 1, 0)])
def test_pairs_are_used_if_they_have_the_same_bits_and_take_less_time(
    monkeypatch, caplog, are_chains, are_faster, used
):
    chosen = []
    library = SimpleNamespace(
        pairs_are_chains=lambda: are_chains, pairs_are_faster=lambda: are_faster, use_pairs=chosen.append
    )
    monkeypatch.setattr(kernels, "load_kernel", lambda *_: library)
    monkeypatch.setattr(kernels, "Kernels", lambda library: library)
    with caplog.at_level(logging.INFO):
        assert load_kernels.__wrapped__() is library
    assert chosen == [used]
    assert ("other bits" in caplog.text) == (not are_chains)


@needs_kernels
@pytest.mark.parametrize("name", [name for name in instructions() if name in (WITH_TILES, WITH_PAIRS)])
def test_pairs_have_the_bits_of_multiply_adds(name):
    """Whether or not they take less time on this processor."""
    of = load_kernels(name)
    x, stored, bias = values(40, 301), narrow(values(70, 301, seed=1)), values(70, seed=2)
    before, found = of.library.use_pairs(0), []
    for choice in (0, 1):
        of.library.use_pairs(choice)
        found.append(product(of, x, [stored], bias, is_narrow=True))
    of.library.use_pairs(before)
    np.testing.assert_array_equal(*found)
    np.testing.assert_array_equal(found[0], chain(x, widen(stored), bias))


@needs_kernels
def test_weights_keep_their_type():
    stored = narrow(values(10, 24))
    assert KERNELS.pack([stored], transposed=False).weights == BFLOAT16
    assert KERNELS.pack([stored, widen(stored)], transposed=False).packed.dtype == np.float32


def test_without_a_compiler_there_are_no_kernels(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert load_kernels.__wrapped__() is None
