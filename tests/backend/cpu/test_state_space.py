"""State spaces of the CPU backends against slow, obvious twins in float64, and in other steps."""

from itertools import pairwise

import numpy as np
import pytest

from backend.cpu.test_backend import BACKENDS, close, values
from backend.cpu.test_delta_rule import segments_of
from moempi.backend.cpu import kernels
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.values import Expert, StateConstants
from moempi.config.architecture import StateSpace

SPACE = StateSpace(num_heads=6, head_dim=7, num_groups=2, state_dim=5, taps=4, least_step=0.3)


def heads_of(mixed):
    rows, at, size = len(mixed), SPACE.num_heads * SPACE.head_dim, SPACE.num_groups * SPACE.state_dim
    of_groups = (rows, SPACE.num_groups, SPACE.state_dim)
    outputs, inputs = mixed[:, at + size :].reshape(of_groups), mixed[:, at : at + size].reshape(of_groups)
    return outputs, inputs, mixed[:, :at].reshape(rows, SPACE.num_heads, SPACE.head_dim)


def constants(seed=3):
    return StateConstants(*values(3, SPACE.num_heads, seed=seed))


def layer(backend, x, steps, state, segments):
    """The convolution and the state spaces of a layer."""
    taps, bias = values(SPACE.taps, SPACE.mixed_dim, seed=4), values(SPACE.mixed_dim, seed=6)
    mixed = backend.causal_conv(x, taps, state, segments, bias)
    return backend.state_space(heads_of(mixed), steps, constants(), state, segments, least_step=SPACE.least_step)


def expected_read(heads, steps, memory):
    """The definition, in float64; brings the memory up to date."""
    outputs, inputs, numbers = (part.astype(np.float64) for part in heads)
    shared, read = SPACE.num_heads // SPACE.num_groups, np.empty(numbers.shape)
    log, bias, skip = (getattr(constants(), name).astype(np.float64) for name in ("decay_log", "step_bias", "skip"))
    for row in range(len(numbers)):
        for head in range(SPACE.num_heads):
            c, b, x = outputs[row, head // shared], inputs[row, head // shared], numbers[row, head]
            step = max(np.log1p(np.exp(float(steps[row, head]) + bias[head])), SPACE.least_step)
            memory[head] = np.exp(-np.exp(log[head]) * step) * memory[head] + np.outer(b, step * x)
            read[row, head] = c @ memory[head] + skip[head] * x
    return read


@BACKENDS
def test_a_convolution_may_have_a_bias(backend):
    x, taps, bias = values(5, SPACE.mixed_dim), values(4, SPACE.mixed_dim, seed=1), values(SPACE.mixed_dim, seed=2)
    actual = backend.causal_conv(x, taps, backend.layer_state(1, SPACE), segments_of((0, 0, 5)), bias)
    for row in range(5):
        total = bias + sum(x[at].astype(np.float64) * taps[3 - (row - at)] for at in range(max(row - 3, 0), row + 1))
        close(backend, actual[row], total / (1 + np.exp(-total)))


@BACKENDS
def test_state_spaces_equal_their_definition(backend):
    heads, steps = heads_of(values(8, SPACE.mixed_dim)), values(8, SPACE.num_heads, seed=2)
    state = backend.layer_state(3, SPACE)
    state.memory[:] = values(*state.memory.shape, seed=5)
    started = state.memory[2].astype(np.float64)
    segments = segments_of((2, 11, 5), (0, 0, 3))
    actual = backend.state_space(heads, steps, constants(), state, segments, least_step=SPACE.least_step)
    close(backend, actual[:5], expected_read([part[:5] for part in heads], steps[:5], started))
    np.testing.assert_allclose(state.memory[2], started, rtol=1e-5, atol=1e-6)
    close(backend, actual[5:], expected_read([part[5:] for part in heads], steps[5:], np.zeros((6, 5, 7))))


@BACKENDS
@pytest.mark.parametrize("cuts", [(0, 40), (0, 1, 40), (0, 7, 14, 21, 28, 35, 40), tuple(range(41))])
def test_any_steps_and_any_other_sequences_give_the_same_bits(backend, cuts):
    x, steps = values(40, SPACE.mixed_dim), values(40, SPACE.num_heads, seed=2)
    alone = backend.layer_state(1, SPACE)
    expected = layer(backend, x, steps, alone, segments_of((0, 0, 40)))
    state = backend.layer_state(4, SPACE)
    for seed, (start, end) in enumerate(pairwise(cuts)):
        others, other_steps = (values(5, part.shape[1], seed=90 + seed) for part in (x, steps))
        rows = np.concatenate([others[:2], x[start:end], others[2:]])
        all_steps = np.concatenate([other_steps[:2], steps[start:end], other_steps[2:]])
        segments = segments_of((0, 3 * seed, 2), (2, start, end - start), (3, 7, 3))
        actual = layer(backend, rows, all_steps, state, segments)
        np.testing.assert_array_equal(actual[2 : 2 + end - start], expected[start:end])
    np.testing.assert_array_equal(state.memory[2], alone.memory[0])
    np.testing.assert_array_equal(state.tail[2], alone.tail[0])


@BACKENDS
def test_a_network_without_a_gate_squares_what_is_positive(backend):
    x, up, down = values(5, 8), values(6, 8, seed=1), values(8, 6, seed=2)
    experts = [Expert(backend.matrix(up), backend.matrix(down), gated=False)] * 2
    hidden = backend.squared_relu(backend.linear(x, experts[0].gate_up))
    found = backend.expert_mlp(x, experts, np.array([2, 3]))
    np.testing.assert_array_equal(found, backend.linear(hidden, experts[0].down))
    close(backend, backend.squared_relu(x), np.maximum(x.astype(np.float64), 0) ** 2)


@pytest.mark.skipif(kernels.load_kernels() is None, reason="no C compiler, or a processor without kernels")
@pytest.mark.parametrize("piece_flops", [1, 3e3, 1e5])
def test_pieces_between_which_rows_travel_change_no_bit(monkeypatch, piece_flops):
    segments = segments_of((1, 0, 20), (0, 3, 1), (2, 9, 0), (3, 0, 6))
    x, steps = values(27, SPACE.mixed_dim), values(27, SPACE.num_heads, seed=2)
    found = []
    for flops in (kernels.PIECE_FLOPS, piece_flops):
        monkeypatch.setattr(kernels, "PIECE_FLOPS", flops)
        calls = []
        backend = CompiledBackend(
            kernels.load_kernels(), precision="float32", progress=lambda seen=calls: seen.append(0)
        )
        state = backend.layer_state(4, SPACE)
        state.tail[:], state.memory[:] = 0.5, 0.25
        found.append((layer(backend, x, steps, state, segments), state.tail, state.memory, len(calls)))
    for whole, divided in zip(found[0][:3], found[1][:3], strict=True):
        np.testing.assert_array_equal(divided, whole)
    assert found[1][3] > found[0][3]
