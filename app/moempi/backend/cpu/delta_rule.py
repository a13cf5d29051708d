"""Linear attention by the gated delta rule in NumPy: position by position, so that bits do not depend on the steps."""

from collections.abc import Callable, Sequence

import numpy as np

from moempi.arrays import Float32Array
from moempi.backend.values import DeltaRates, Segment

LEAST_LENGTH = 1e-6
"""Added to the sum of squares of a query or key before its root."""
POSITIONS = 32
"""Positions between two calls of `progress`."""


def silu(x: Float32Array) -> Float32Array:
    """Each number times its sigmoid."""
    divisor = np.negative(x)
    with np.errstate(over="ignore"):
        np.exp(divisor, out=divisor)
    divisor += 1
    quotient: Float32Array = np.divide(x, divisor, out=divisor)
    return quotient


def convolve(
    x: Float32Array,
    taps: Float32Array,
    tail: Float32Array,
    segments: Sequence[Segment],
    bias: Float32Array | None = None,
) -> Float32Array:
    """See `StateVerbs.causal_conv`; the products are added in the order of the positions, not rounded."""
    sums, look_back = np.empty(x.shape, np.float32), len(taps) - 1
    for segment in segments:
        rows = slice(segment.row, segment.row + segment.length)
        before = tail[segment.state] if segment.start else np.zeros((look_back, x.shape[1]), np.float32)
        seen = np.concatenate([before, x[rows]])
        of_segment = seen[: segment.length] * taps[0]
        if bias is not None:
            of_segment += bias
        for tap in range(1, look_back + 1):
            of_segment += seen[tap : tap + segment.length] * taps[tap]
        sums[rows] = of_segment
        tail[segment.state] = seen[segment.length :]
    return silu(sums)


def apply_delta_rule(
    heads: tuple[Float32Array, Float32Array, Float32Array],
    rates: Float32Array,
    constants: DeltaRates,
    memory: Float32Array,
    segments: Sequence[Segment],
    *,
    progress: Callable[[], None],
) -> Float32Array:
    """See `StateVerbs.delta_rule`; not rounded. Calls `progress` every POSITIONS positions."""
    queries, keys, values = heads
    shared = values.shape[1] // keys.shape[1]
    queries = _unit(queries) * np.float32(queries.shape[-1] ** -0.5)
    queries, keys = (np.repeat(part, shared, axis=1)[..., None] for part in (queries, _unit(keys)))
    alpha, beta = alpha_and_beta(rates, constants)
    alpha, beta = alpha[..., None, None], beta[..., None]
    read = np.empty(values.shape, np.float32)
    for segment in segments:
        state = memory[segment.state]
        if not segment.start:
            state[:] = 0
        for row in range(segment.row, segment.row + segment.length):
            state *= alpha[row]
            change = (values[row] - (state * keys[row]).sum(axis=1)) * beta[row]
            state += keys[row] * change[:, None, :]
            read[row] = (state * queries[row]).sum(axis=1)
            if row % POSITIONS == 0:
                progress()
    return read


def _unit(x: Float32Array) -> Float32Array:
    length: Float32Array = np.sqrt(np.square(x).sum(axis=-1, keepdims=True) + np.float32(LEAST_LENGTH))
    return x / length


def alpha_and_beta(rates: Float32Array, constants: DeltaRates) -> tuple[Float32Array, Float32Array]:
    """The decay and the rate of change (T, H); rounded from float64, whose bits differ less between processors."""
    heads = rates.shape[1] // 2
    wide = rates.astype(np.float64)
    decay = np.exp(constants.decay_log.astype(np.float64)) * np.logaddexp(0, wide[:, heads:] + constants.decay_bias)
    with np.errstate(over="ignore", under="ignore"):
        alpha, beta = np.exp(-decay).astype(np.float32), (1 / (1 + np.exp(-wide[:, :heads]))).astype(np.float32)
    return alpha, beta
