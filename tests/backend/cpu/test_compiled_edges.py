"""The compiled kernels at the edges of vectors, panels, blocks and pages use nothing beyond their arrays."""

import os
import subprocess
import sys

import numpy as np
import pytest

from backend.cpu.guarded import guarded
from moempi.arrays import narrow, round_to_bfloat16
from moempi.backend.cpu.attention_layout import CachedRows
from moempi.backend.cpu.kernels import BFLOAT16, FLOAT32, MatrixProduct, PanelMatrix, Rotation, load_kernels
from moempi.backend.values import Cache, RmsNorm
from moempi.config.architecture import Clamp

KERNELS = load_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler, or a processor without kernels")
AT_END = pytest.mark.parametrize("at_end", [True, False])
LARGEST_NAN = np.uint32(0x7FFF0000).view(np.float32)
WIDTHS = (1, 15, 16, 17, 31, 33)
PACKINGS = pytest.mark.parametrize(("packing", "is_narrow"), [(FLOAT32, False), (BFLOAT16, False), (BFLOAT16, True)])


def values(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


@AT_END
@PACKINGS
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 31, 32, 33, 65, 129])
@pytest.mark.parametrize("inputs", [1, 2, 31, 64])
def test_products_of_edge_sizes(inputs, outputs, packing, is_narrow, at_end):
    weights, bias = values(outputs, inputs, seed=1), guarded(values(outputs, seed=2), at_end=at_end)
    stored = guarded(weights if packing == FLOAT32 else narrow(weights), at_end=at_end)
    packed = KERNELS.pack([stored], transposed=False)
    transposed = KERNELS.pack([stored.T], transposed=True)
    assert packed.weights == packing
    np.testing.assert_array_equal(packed.packed, transposed.packed)
    matrix = PanelMatrix(guarded(packed.packed, at_end=at_end), packed.shape, packing)
    for rows in (1, 2, 5, 6, 7, 12, 13, 25, 97):
        x = guarded(values(rows, inputs), at_end=at_end)
        out = guarded(np.full((rows, outputs), np.nan, np.float32), at_end=at_end)
        KERNELS.multiply(x, [MatrixProduct(matrix, rows, bias=bias)], out, narrow=is_narrow, rounded=False)
        np.testing.assert_allclose(out, x.astype(np.float64) @ weights.astype(np.float64).T + bias, atol=1e-4)


@PACKINGS
@pytest.mark.parametrize("special", [np.nan, LARGEST_NAN, np.inf, -np.inf, 2.0**-130, 2.0**127, -0.0])
def test_special_numbers_stay_in_their_row(special, packing, is_narrow):
    x, weights = values(13, 5), values(17, 5, seed=1)
    stored = weights if packing == FLOAT32 else narrow(weights)
    matrix, results = KERNELS.pack([stored], transposed=False), []
    for rounded in (False, True):
        for number in (x[3, 2], special):
            changed, out = x.copy(), np.empty((13, 17), np.float32)
            changed[3, 2] = number
            KERNELS.multiply(changed, [MatrixProduct(matrix, 13)], out, narrow=is_narrow, rounded=rounded)
            results.append(out)
    for plain, found in (results[:2], results[2:]):
        np.testing.assert_array_equal(np.delete(found, 3, axis=0), np.delete(plain, 3, axis=0))
    x[3, 2] = special
    with np.errstate(over="ignore", invalid="ignore"):
        exact = (x[3].astype(np.float64) @ weights.astype(np.float64).T).astype(np.float32)
    np.testing.assert_allclose(results[1][3], exact, rtol=1e-5, atol=1e-5)


@AT_END
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_of_edge_sizes(width, at_end):
    x, y = (guarded(values(3, width, seed=seed), at_end=at_end) for seed in (1, 2))
    weight = guarded(values(width, seed=3), at_end=at_end)
    total, normalized = KERNELS.normalize(x, weight, eps=1e-6, quotient_rounded=False, rounded=False, y=y)
    np.testing.assert_array_equal(total, x + y)
    scale = np.sqrt((total.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(normalized, total / scale * weight, rtol=1e-5)
    gate_up = guarded(values(3, 2 * width, seed=4), at_end=at_end)
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(KERNELS.activate(gate_up, None, rounded=False), expected, rtol=1e-5, atol=1e-6)
    KERNELS.activate(gate_up, Clamp(alpha=1.0, limit=1.0), rounded=True)


@AT_END
@pytest.mark.parametrize("cached_type", [np.uint16, np.float32])
@pytest.mark.parametrize("dim", WIDTHS)
def test_rotations_and_attention_of_edge_sizes(dim, cached_type, at_end):
    def cached(numbers):
        return guarded(narrow(numbers) if cached_type == np.uint16 else numbers, at_end=at_end)

    keys, queries = cached(values(64, 2, dim)), guarded(values(5, 4, dim, seed=1), at_end=at_end)
    held, angles = cached(values(64, 2, dim, seed=2)), tuple(guarded(values(5, 1, dim // 2)) for _ in range(2))
    rows = guarded(np.array([59, 60, 61, 62, 63]), at_end=at_end)
    for norm in (None, RmsNorm(guarded(values(dim, seed=3), at_end=at_end), 1e-6)):
        for interleaved in (False, True):
            rotation = Rotation(*angles, interleaved=interleaved, rounded=True)
            KERNELS.rotate_into(keys, rows, guarded(values(5, 2, dim)), rotation, norm)
            assert np.isfinite(KERNELS.rotate(queries, rotation, norm)).all()
    pages, cache = guarded(np.zeros(1, np.int32), at_end=at_end), Cache(keys, held)
    many_queries = guarded(values(40, 4, dim, seed=4), at_end=at_end)  # whose keys are transposed
    for each in (queries, many_queries):
        segments = guarded(np.array([[0, len(each), 64 - len(each), 0]]), at_end=at_end)
        layout = CachedRows((), segments, segments, pages, rows)
        for window, sinks in ((0, None), (7, guarded(values(4), at_end=at_end))):
            found = KERNELS.attend(each, cache, layout, window=window, sinks=sinks, rounded=True)
            assert np.isfinite(found).all()


@AT_END
@pytest.mark.parametrize("cached_type", [np.uint16, np.float32])
@pytest.mark.parametrize("dim", WIDTHS)
def test_selections_of_edge_sizes(dim, cached_type, at_end):
    numbers = values(64, 1, dim)
    keys = guarded(narrow(numbers) if cached_type == np.uint16 else numbers, at_end=at_end)
    queries, weights = guarded(values(5, 3, dim, seed=1), at_end=at_end), guarded(values(5, 3, seed=2), at_end=at_end)
    segments, pages = guarded(np.array([[0, 5, 59, 0]]), at_end=at_end), guarded(np.zeros(1, np.int32), at_end=at_end)
    layout = CachedRows((), segments, segments, pages, np.arange(59, 64))
    for top_k in (1, 7, 59):
        chosen = KERNELS.select_positions(
            queries, weights, Cache(keys, keys), layout, top_k=top_k, progress=lambda: None
        )
        assert (np.diff(chosen, axis=1) > 0).all()
        assert (chosen[:, -1] < np.arange(60, 65)).all()
        assert (chosen >= 0).all()


@AT_END
@pytest.mark.parametrize("dim", WIDTHS)
def test_delta_rules_and_state_spaces_of_edge_sizes(dim, at_end):
    def guarded_values(*shape, seed):
        return guarded(values(*shape, seed=seed), at_end=at_end)

    spans = guarded(np.array([[0, 2, 0, 1], [2, 3, 9, 0]]), at_end=at_end)
    tail, memory = guarded_values(2, 3, 4 * dim, seed=1), guarded_values(2, 2, dim, dim, seed=2)
    x, taps, bias = (guarded_values(*shape, seed=3) for shape in ((5, 4 * dim), (4, 4 * dim), (4 * dim,)))
    mixed = KERNELS.convolve(x, taps, bias, tail, spans, rounded=False)
    mixed = guarded(mixed, at_end=at_end)
    heads = tuple(
        mixed[:, part].reshape(5, -1, dim) for part in (slice(dim), slice(dim, 2 * dim), slice(2 * dim, None))
    )
    alpha, beta = (guarded(np.abs(values(5, 2, seed=seed)) / 4, at_end=at_end) for seed in (5, 6))
    read = KERNELS.apply_delta_rule(heads, alpha, beta, memory, spans, rounded=True)
    outputs, inputs = (guarded(np.ascontiguousarray(part), at_end=at_end) for part in heads[:2])
    spaces, skip = (outputs, inputs, heads[2]), guarded_values(2, seed=9)
    read += KERNELS.apply_state_space(spaces, (alpha, beta), skip, memory, spans, rounded=True)
    norm = RmsNorm(guarded_values(dim, seed=7), 1e-6)
    gated = KERNELS.normalize_gated(guarded(read, at_end=at_end), guarded_values(5, 2, dim, seed=8), norm, rounded=True)
    assert all(np.isfinite(found).all() for found in (mixed, tail, memory, gated))


@pytest.mark.skipif("-fsanitize" not in os.environ.get("CC", ""), reason="for tests/sanitize.sh")
def test_the_sanitizer_reports_an_array_that_is_too_short():
    program = (
        "import numpy as np; from moempi.backend.cpu.kernels import load_kernels;"
        "w, packed = np.zeros(7 * 1000 - 1, np.uint16), np.zeros(8 * 1024, np.uint16);"
        "load_kernels().library.pack(w.ctypes.data, packed.ctypes.data, 7, 1000, 0, 0, 1)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in ended.stderr
