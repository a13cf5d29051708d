"""The gated delta rule of the CPU backends against slow, obvious twins in float64, and in other steps."""

from itertools import pairwise

import numpy as np
import pytest

from backend.cpu.test_backend import BACKENDS, close, values
from moempi.backend.cpu import kernels
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.values import DeltaRates, RmsNorm, Segment
from moempi.config.architecture import DeltaRule

RULE = DeltaRule(num_key_heads=2, num_value_heads=6, key_dim=5, value_dim=7, taps=4)
PAGES = np.zeros(1, np.int64)


def segments_of(*spans):
    """Segments for (state, start, length), one after another."""
    rows = np.cumsum([0, *(length for *_, length in spans)]).tolist()
    return tuple(
        Segment(row, length, start, PAGES, state) for row, (state, start, length) in zip(rows, spans, strict=False)
    )


def heads_of(mixed):
    rows, keys = len(mixed), RULE.num_key_heads * RULE.key_dim
    return (
        mixed[:, :keys].reshape(rows, RULE.num_key_heads, RULE.key_dim),
        mixed[:, keys : 2 * keys].reshape(rows, RULE.num_key_heads, RULE.key_dim),
        mixed[:, 2 * keys :].reshape(rows, RULE.num_value_heads, RULE.value_dim),
    )


def constants(seed=3):
    log, bias = values(2, RULE.num_value_heads, seed=seed)
    return DeltaRates(log, bias)


def layer(backend, x, rates, state, segments):
    """The convolution and the rule of a layer."""
    mixed = backend.causal_conv(x, values(RULE.taps, RULE.mixed_dim, seed=4), state, segments)
    return backend.delta_rule(heads_of(mixed), rates, constants(), state, segments)


def expected_rule(heads, rates, memory):
    """The definition, in float64; brings the memory up to date."""
    queries, keys, inputs = (part.astype(np.float64) for part in heads)
    shared, outputs = RULE.num_value_heads // RULE.num_key_heads, np.empty(inputs.shape)
    log, bias = constants().decay_log.astype(np.float64), constants().decay_bias.astype(np.float64)
    for row in range(len(inputs)):
        for head in range(RULE.num_value_heads):
            q, k = queries[row, head // shared], keys[row, head // shared]
            q, k = q / np.sqrt(q @ q + 1e-6) / np.sqrt(RULE.key_dim), k / np.sqrt(k @ k + 1e-6)
            beta = 1 / (1 + np.exp(-float(rates[row, head])))
            softplus = np.log1p(np.exp(float(rates[row, RULE.num_value_heads + head]) + bias[head]))
            state = np.exp(-np.exp(log[head]) * softplus) * memory[head]
            state = state + np.outer(k, beta * (inputs[row, head] - k @ state))
            memory[head], outputs[row, head] = state, q @ state
    return outputs


@BACKENDS
def test_a_convolution_is_a_sum_over_the_last_rows_of_its_sequence(backend):
    x, taps = values(9, RULE.mixed_dim), values(RULE.taps, RULE.mixed_dim, seed=1)
    state = backend.layer_state(2, RULE)
    state.tail[:] = np.nan  # of a sequence that has ended
    actual = backend.causal_conv(x, taps, state, segments_of((1, 0, 2), (0, 0, 7)))
    for rows in (range(2), range(2, 9)):
        for row in rows:
            seen = range(max(row - 3, rows.start), row + 1)
            total = sum(x[at].astype(np.float64) * taps[RULE.taps - 1 - (row - at)] for at in seen)
            close(backend, actual[row], total / (1 + np.exp(-total)))
    np.testing.assert_array_equal(state.tail[0], x[6:9])
    np.testing.assert_array_equal(state.tail[1], np.concatenate([np.zeros((1, RULE.mixed_dim)), x[:2]]))


@BACKENDS
def test_the_rule_equals_its_definition(backend):
    heads, rates = heads_of(values(8, RULE.mixed_dim)), values(8, 2 * RULE.num_value_heads, seed=2)
    state = backend.layer_state(3, RULE)
    state.memory[:] = values(*state.memory.shape, seed=5)
    started = state.memory[2].astype(np.float64)
    actual = backend.delta_rule(heads, rates, constants(), state, segments_of((2, 11, 5), (0, 0, 3)))
    expected = expected_rule([part[:5] for part in heads], rates[:5], started)
    close(backend, actual[:5], expected)
    np.testing.assert_allclose(state.memory[2], started, rtol=1e-5, atol=1e-6)
    close(backend, actual[5:], expected_rule([part[5:] for part in heads], rates[5:], np.zeros((6, 5, 7))))


@BACKENDS
def test_a_gated_norm_equals_its_definition(backend):
    x, gate, weight = values(4, 3, 7), values(4, 3, 7, seed=1), values(7, seed=2)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    close(backend, backend.gated_norm(x, gate, RmsNorm(weight, 1e-5)), expected * gate / (1 + np.exp(-gate)))


@BACKENDS
@pytest.mark.parametrize("cuts", [(0, 40), (0, 1, 40), (0, 7, 14, 21, 28, 35, 40), tuple(range(41))])
def test_any_steps_and_any_other_sequences_give_the_same_bits(backend, cuts):
    x, rates = values(40, RULE.mixed_dim), values(40, 2 * RULE.num_value_heads, seed=2)
    alone = backend.layer_state(1, RULE)
    expected = layer(backend, x, rates, alone, segments_of((0, 0, 40)))
    state = backend.layer_state(4, RULE)
    for seed, (start, end) in enumerate(pairwise(cuts)):
        others, other_rates = (values(5, part.shape[1], seed=90 + seed) for part in (x, rates))
        rows = np.concatenate([others[:2], x[start:end], others[2:]])
        all_rates = np.concatenate([other_rates[:2], rates[start:end], other_rates[2:]])
        segments = segments_of((0, 3 * seed, 2), (2, start, end - start), (3, 7, 3))
        actual = layer(backend, rows, all_rates, state, segments)
        np.testing.assert_array_equal(actual[2 : 2 + end - start], expected[start:end])
    np.testing.assert_array_equal(state.memory[2], alone.memory[0])
    np.testing.assert_array_equal(state.tail[2], alone.tail[0])


@BACKENDS
def test_each_number_may_have_its_own_gate(backend):
    x, logits = values(5, 6), values(5, 6, seed=1)
    close(backend, backend.scale_by_sigmoid(x, logits), x / (1 + np.exp(-logits.astype(np.float64))))


@pytest.mark.skipif(kernels.load_kernels() is None, reason="no C compiler, or a processor without kernels")
@pytest.mark.parametrize("piece_flops", [1, 3e3, 1e5])
def test_pieces_between_which_rows_travel_change_no_bit(monkeypatch, piece_flops):
    segments = segments_of((1, 0, 20), (0, 3, 1), (2, 9, 0), (3, 0, 6))
    x, rates = values(27, RULE.mixed_dim), values(27, 2 * RULE.num_value_heads, seed=2)
    found = []
    for flops in (kernels.PIECE_FLOPS, piece_flops):
        monkeypatch.setattr(kernels, "PIECE_FLOPS", flops)
        calls = []
        backend = CompiledBackend(
            kernels.load_kernels(), precision="float32", progress=lambda seen=calls: seen.append(0)
        )
        state = backend.layer_state(4, RULE)
        state.tail[:], state.memory[:] = 0.5, 0.25
        found.append((layer(backend, x, rates, state, segments), state.tail, state.memory, len(calls)))
    for whole, divided in zip(found[0][:3], found[1][:3], strict=True):
        np.testing.assert_array_equal(divided, whole)
    assert found[1][3] > found[0][3]
