"""Outputs that return home: the shared experts' rows are added first, then the residual, each rounded."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moempi.arrays import round_to_bfloat16
from moempi.backend.cpu.backend import NumpyBackend
from moempi.comm.addends import Addends, Sums
from moempi.comm.combine import HomeCombine
from moempi.layout.schedule import Point

PLAN, OUTPUTS, BUFFER = object(), object(), object()
POINTS = [Point(3, "combine")]


class FakeExchange:
    """Yields POINTS, and returns `rows` for the combined outputs, plus the addends."""

    def __init__(self, rows, backend):
        self.rows = rows
        self.backend = backend
        self.calls = []

    def outputs_buffer(self, plan):
        assert plan is PLAN
        return BUFFER

    def combine(self, outputs, plan, addends):
        self.calls.append((outputs, plan))
        yield from POINTS
        return Sums(reduce(self.backend.add, addends.in_order(), self.rows))


def combine(rows, *, shared=None, residual=None, precision="float32"):
    """What HomeCombine returns, and the points that it yielded."""
    exchange = FakeExchange(rows, NumpyBackend(precision=precision))
    home = HomeCombine(exchange)
    addends = Addends(shared, residual)
    assert home.begin(PLAN, addends) is BUFFER
    assert exchange.calls == []
    finishing, points = home.finish(OUTPUTS, PLAN, addends), []
    while True:
        try:
            points.append(next(finishing))
        except StopIteration as end:
            assert exchange.calls == [(OUTPUTS, PLAN)]
            return end.value.rows, points


def row(*values):
    return np.array([values], np.float32)


def test_the_points_are_the_exchange_s_own():
    _, points = combine(row(1), shared=row(2), residual=row(3))
    assert points == POINTS


def test_the_shared_rows_are_added_before_the_residual():
    # In float32, 1e8 + 1 is 1e8: any other order gives 0 for the first number.
    combined, _ = combine(row(1e8, 1), shared=row(-1e8, 2), residual=row(1, 4))
    assert combined.tolist() == [[1.0, 7.0]]


def test_each_sum_is_rounded_to_the_run_s_precision():
    # bfloat16 has 8 bits: 256 + 1 is 256 (a tie, to even), twice; rounded once, 256 + 2 is 258.
    combined, _ = combine(row(256), shared=row(1), residual=row(1), precision="bfloat16")
    assert combined.tolist() == [[256.0]]


@pytest.mark.parametrize(("shared", "residual", "total"), [(None, None, 1), (2, None, 3), (None, 4, 5), (2, 4, 7)])
def test_only_the_addends_that_there_are_are_added(shared, residual, total):
    addends = {"shared": shared and row(shared), "residual": residual and row(residual)}
    combined, _ = combine(row(1), **addends)
    assert combined.tolist() == [[total]]


def test_a_step_without_rows_combines_none():
    empty = np.zeros((0, 8), np.float32)
    combined, points = combine(empty, shared=empty, residual=empty)
    assert (combined.shape, points) == ((0, 8), POINTS)


@given(st.integers(0, 2**32), st.sampled_from(["float32", "bfloat16"]))
def test_the_bits_are_two_rounded_additions_in_this_order(seed, precision):
    random = np.random.default_rng(seed)
    rounded = round_to_bfloat16 if precision == "bfloat16" else np.float32
    rows, shared, residual = (rounded(random.normal(size=(5, 4)).astype(np.float32)) for _ in range(3))
    before = [array.copy() for array in (rows, shared, residual)]
    combined, _ = combine(rows, shared=shared, residual=residual, precision=precision)
    np.testing.assert_array_equal(combined, rounded(rounded(rows + shared) + residual))
    for array, old in zip((rows, shared, residual), before, strict=True):
        np.testing.assert_array_equal(array, old)
