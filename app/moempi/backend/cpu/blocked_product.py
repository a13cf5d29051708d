"""Matrix products in which the bits of a row do not depend on the number of rows of the call.

BLAS chooses the order of its sums by the shape of the call. The reference result is a call of BLOCK rows. A call of
more rows is made only if a trial with random numbers has given the same bits for its shape: of many sums of random
terms in another order, some would differ.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from moempi.arrays import Float32Array

BLOCK = 8
EXACT_ROWS = 2 * BLOCK
MOST_ROWS = 256
TRIAL_NUMBERS = 65521
TRIAL_SUMS = 64
"""The least number of sums of each row that a trial compares: a single sum often has the same bits in another order."""


def blocked_product(
    x: Float32Array, matrix: Float32Array, *, most_rows: int, progress: Callable[[], None]
) -> Float32Array:
    """Multiply x (T, inputs) by matrix (inputs, outputs); calls `progress` after every `most_rows` rows or fewer."""
    inputs, outputs = matrix.shape
    product = np.empty((len(x), outputs), np.float32)
    first = 0
    while first < len(x):
        rows = _call_rows(inputs, outputs, min(len(x) - first, most_rows))
        last = min(first + rows, len(x))
        if last - first == rows:
            np.matmul(x[first:last], matrix, out=product[first:last])
        else:
            product[first:last] = np.matmul(_padded(x[first:last], rows), matrix)[: last - first]
        progress()
        first = last
    return product


def _call_rows(inputs: int, outputs: int, num_rows: int) -> int:
    """The number of rows of the next call: at least 2; it may exceed `num_rows`, because few shapes are tried."""
    num_rows = min(num_rows, MOST_ROWS)
    while num_rows > BLOCK:
        rows = num_rows if num_rows <= EXACT_ROWS else -(-num_rows // BLOCK) * BLOCK
        if _gives_same_bits(inputs, outputs, rows):
            return rows
        num_rows //= 2
    rows = max(num_rows, 2)
    return rows if _gives_same_bits(inputs, outputs, rows) else BLOCK


@cache
def _gives_same_bits(inputs: int, outputs: int, rows: int) -> bool:
    return all(_trial_has_same_bits(inputs, outputs, rows, number) for number in range(-(-TRIAL_SUMS // outputs)))


def _trial_has_same_bits(inputs: int, outputs: int, rows: int, number: int) -> bool:
    matrix, x = (_trial(*shape, number, seed) for seed, shape in ((1, (inputs, outputs)), (2, (rows, inputs))))
    blocks = _padded(x, -(-rows // BLOCK) * BLOCK).reshape(-1, BLOCK, inputs)
    return np.array_equal(np.matmul(x, matrix), np.matmul(blocks, matrix).reshape(-1, outputs)[:rows])


def _trial(rows: int, columns: int, number: int, seed: int) -> Float32Array:
    """The numbers of a trial: others for each number below TRIAL_SUMS."""
    return np.resize(_random(seed)[number * TRIAL_NUMBERS // TRIAL_SUMS // 2 :], (rows, columns))


@cache
def _random(seed: int) -> Float32Array:
    return np.random.default_rng(seed).standard_normal(TRIAL_NUMBERS, np.float32)


def _padded(x: Float32Array, rows: int) -> Float32Array:
    padded = np.zeros((rows, x.shape[1]), np.float32)
    padded[: len(x)] = x
    return padded
