"""Selective state spaces in NumPy: position by position, so that bits do not depend on the steps."""

from collections.abc import Callable, Sequence

import numpy as np

from moempi.arrays import Float32Array
from moempi.backend.cpu.delta_rule import POSITIONS
from moempi.backend.values import Segment, StateConstants


def apply_state_space(
    heads: tuple[Float32Array, Float32Array, Float32Array],
    rates: tuple[Float32Array, Float32Array],
    skip: Float32Array,
    memory: Float32Array,
    segments: Sequence[Segment],
    *,
    progress: Callable[[], None],
) -> Float32Array:
    """See `StateVerbs.state_space`, given decays and steps (T, H); not rounded. Calls `progress` every POSITIONS."""
    (outputs, inputs, values), (alpha, steps) = heads, rates
    shared = values.shape[1] // inputs.shape[1]
    decays, changes = alpha[..., None, None], (values * steps[..., None])[:, :, None, :]
    read = np.empty(values.shape, np.float32)
    for segment in segments:
        state = memory[segment.state]
        if not segment.start:
            state[:] = 0
        for row in range(segment.row, segment.row + segment.length):
            state *= decays[row]
            input_row, output_row = (np.repeat(part[row], shared, axis=0)[..., None] for part in (inputs, outputs))
            state += input_row * changes[row]
            read[row] = (state * output_row).sum(axis=1)
            if row % POSITIONS == 0:
                progress()
    read += values * skip[:, None]
    return read


def alpha_and_steps(
    steps: Float32Array, constants: StateConstants, *, least_step: float
) -> tuple[Float32Array, Float32Array]:
    """The decay and the step (T, H); rounded from float64, whose bits differ less between processors."""
    wide = np.maximum(np.logaddexp(0, steps.astype(np.float64) + constants.step_bias), least_step)
    with np.errstate(over="ignore", under="ignore"):
        alpha = np.exp(-np.exp(constants.decay_log.astype(np.float64)) * wide)
        return alpha.astype(np.float32), wide.astype(np.float32)
