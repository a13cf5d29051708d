"""The compiled product at the edges of its vectors, panels and blocks reads and writes nothing beyond its arrays."""

import os
import subprocess
import sys

import numpy as np
import pytest

from backend.cpu.guarded import guarded
from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.cpu.packed_matrix import PANEL, _kernel, packing_works

pytestmark = pytest.mark.skipif(not packing_works(), reason="no AVX512-BF16 or no C compiler")

INPUTS = (0, 1, 2, 3, 31, 64, 65)
OUTPUTS = (1, 15, 16, 17, 63, 64, 65, 129)
ROWS = (0, 1, 5, 6, 7, 23, 24, 25)
CACHED_PAIRS = 1 << 16
BLOCK_ROWS = 6
LARGEST_NAN = np.uint32(0x7FFF0000).view(np.float32)


def values(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


def pack(stored, *, at_end, transposed=False, first=0, outputs=None):
    """The panels of stored (outputs, inputs) or, if `transposed`, (inputs, outputs), from output `first` on."""
    count, inputs = stored.shape[::-1] if transposed else stored.shape
    panels = -(-(outputs or count) // PANEL)
    packed = guarded(np.zeros((panels, (inputs + 1) // 2, PANEL, 2), np.uint16), at_end=at_end)
    held = guarded(stored, at_end=at_end)
    _kernel().pack(held.ctypes.data, packed.ctypes.data, inputs, count, first, int(transposed))
    return packed


def multiply(x, packed, outputs, *, at_end, rounded=False):
    rows, inputs = x.shape
    pairs = guarded(np.zeros((rows, (inputs + 1) // 2), np.uint32), at_end=at_end)
    out = guarded(np.full((rows, outputs), np.nan, np.float32), at_end=at_end)
    x = guarded(x, at_end=at_end)
    addresses = (array.ctypes.data for array in (x, pairs, packed, out))
    _kernel().product(*addresses, rows, inputs, outputs, int(rounded))
    return out


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("inputs", INPUTS)
def test_products_of_edge_sizes(inputs, outputs, at_end):
    stored = narrow(values(outputs, inputs, seed=1))
    packed = pack(stored, at_end=at_end)
    np.testing.assert_array_equal(packed, pack(stored.T, at_end=at_end, transposed=True))
    for rows in ROWS:
        x = values(rows, inputs)
        exact = x.astype(np.float64) @ widen(stored).astype(np.float64).T
        np.testing.assert_allclose(multiply(x, packed, outputs, at_end=at_end), exact, atol=1e-4)


@pytest.mark.parametrize("at_end", [True, False])
def test_parts_are_packed_beside_each_other(at_end):
    outputs, inputs, cut = 2 * PANEL + 1, 5, PANEL - 1
    stored = narrow(values(outputs, inputs))
    parts = [
        pack(stored[:cut], at_end=at_end, outputs=outputs),
        pack(stored[cut:], at_end=at_end, first=cut, outputs=outputs),
    ]
    np.testing.assert_array_equal(parts[0] | parts[1], pack(stored, at_end=at_end))


@pytest.mark.parametrize("difference", [-1, 0, 1])
def test_rows_beyond_those_whose_pairs_fit_in_the_cache(difference):
    inputs = 2 * CACHED_PAIRS // (10 * BLOCK_ROWS)
    x, stored = values(10 * BLOCK_ROWS + difference, inputs), narrow(values(3, inputs, seed=1))
    exact = x.astype(np.float64) @ widen(stored).astype(np.float64).T
    np.testing.assert_allclose(multiply(x, pack(stored, at_end=True), 3, at_end=True), exact, atol=1e-2)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("special", [np.nan, LARGEST_NAN, np.inf, -np.inf, 2.0**-130, 2.0**127, -0.0])
def test_special_numbers_stay_in_their_row(special, rounded):
    """A denormal counts as zero, a sum beyond float32 is infinite, and no other row changes."""
    x, stored = values(7, 5), narrow(values(17, 5, seed=1))
    packed = pack(stored, at_end=True)
    plain = multiply(x, packed, 17, at_end=True, rounded=rounded)
    x[3, 2] = special
    found = multiply(x, packed, 17, at_end=True, rounded=rounded)
    np.testing.assert_array_equal(np.delete(found, 3, axis=0), np.delete(plain, 3, axis=0))
    with np.errstate(over="ignore", invalid="ignore"):
        exact = (x[3].astype(np.float64) @ widen(stored).astype(np.float64).T).astype(np.float32)
    np.testing.assert_allclose(found[3], exact, rtol=2.0**-8, atol=2.0**-8)


@pytest.mark.skipif("-fsanitize" not in os.environ.get("CC", ""), reason="for tests/sanitize.sh")
def test_the_sanitizer_reports_an_array_that_is_too_short():
    program = (
        "import numpy as np; from moempi.backend.cpu.packed_matrix import _kernel;"
        "w, packed = np.zeros(7 * 1000 - 1, np.uint16), np.zeros(8 * 1024, np.uint16);"
        "_kernel().pack(w.ctypes.data, packed.ctypes.data, 7, 1000, 0, 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in ended.stderr
