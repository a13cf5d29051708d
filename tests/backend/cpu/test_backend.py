"""Every verb of the CPU backend against a slow, obvious twin in float64."""

import warnings

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import load_kernels
from moempi.backend.scores import SUM_TOKENS, RowScores
from moempi.backend.values import Expert, Segment
from moempi.config.architecture import Clamp, Router

EXACT = NumpyBackend(precision="float32")
ROUNDING = NumpyBackend(precision="bfloat16")
NAN_BITS = 0x7FC0
KERNELS = load_kernels()
COMPILED = [CompiledBackend(KERNELS, precision=precision) for precision in ("float32", "bfloat16") if KERNELS]
BACKENDS = pytest.mark.parametrize(
    "backend",
    [EXACT, ROUNDING, *COMPILED],
    ids=["float32", "bfloat16", *(f"compiled {name}" for name in ("float32", "bfloat16") if KERNELS)],
)


def values(*shape, seed=0, scale=1.0):
    """Random rows of bfloat16 values."""
    return round_to_bfloat16((np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32))


def close(backend, actual, expected):
    """Equal within float32 rounding, or within half a unit in the last place of bfloat16."""
    tolerance = 2.0**-8 if backend.is_bfloat16 else 2e-6
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max() * 0.02)


def test_bfloat16_rounds_to_the_nearest_with_ties_to_even():
    bits = np.array([0x3F80, 0x3F81, 0x0001, 0x8000, 0x7F7F, 0x7F80], np.uint16)
    np.testing.assert_array_equal(narrow(widen(bits)), bits)
    halfway = np.array([0x3F808000, 0x3F818000, 0x3F818001, 0x3F807FFF], np.uint32).view(np.float32)
    np.testing.assert_array_equal(narrow(halfway), [0x3F80, 0x3F82, 0x3F82, 0x3F80])
    np.testing.assert_array_equal(narrow(round_to_bfloat16(halfway)), narrow(halfway))
    assert np.isnan(round_to_bfloat16(np.array([np.nan], np.float32))).all()


@BACKENDS
def test_rms_norm_equals_its_definition(backend):
    x, weight = values(5, 3, 16), values(16, seed=1)
    expected = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    actual = backend.rms_norm(x, weight, eps=1e-5)
    np.testing.assert_allclose(actual, expected, rtol=2.0**-7 if backend.is_bfloat16 else 2e-6)


@BACKENDS
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 65])
def test_linear_multiplies_by_joined_and_transposed_matrices(backend, rows):
    x, weight, extra = values(rows, 24), values(10, 24, seed=1), values(6, 24, seed=2)
    matrix = backend.matrix(narrow(weight), narrow(extra))
    expected = x.astype(np.float64) @ np.concatenate([weight, extra]).astype(np.float64).T
    actual = backend.linear(x, matrix)
    assert actual.shape == (rows, 16)
    if rows:
        close(backend, actual, expected)
    transposed = backend.matrix(narrow(weight).T, narrow(extra).T, transposed=True)
    np.testing.assert_array_equal(actual, backend.linear(x, transposed))


@BACKENDS
def test_unrounded_rms_norm_and_layer_norm_equal_their_definitions(backend):
    x, weight, bias = values(5, 16), values(16, seed=1), values(16, seed=2)
    exact = x.astype(np.float64)
    root = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * weight
    close(backend, backend.rms_norm(x, weight, eps=1e-5, rounded=False), root)
    layer = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5) * weight + bias
    close(backend, backend.layer_norm(x, weight, bias, eps=1e-5), layer)


@BACKENDS
@pytest.mark.parametrize("rows", [0, 1, 9, 65])
def test_linear_with_a_bias_rounds_once(backend, rows):
    x, weight, bias = values(rows, 24), values(10, 24, seed=1), values(10, seed=2)
    actual = backend.linear(x, backend.matrix(narrow(weight)), bias)
    assert actual.shape == (rows, 10)
    if rows:
        close(backend, actual, x.astype(np.float64) @ weight.astype(np.float64).T + bias)


@BACKENDS
@pytest.mark.parametrize("rows", [0, 1, 9, 65])
def test_linear_heads_multiplies_each_head_by_its_matrix(backend, rows):
    x, matrices = values(rows, 3, 6), values(3, 6, 4, seed=1)
    actual = backend.linear_heads(x, backend.head_matrices(narrow(matrices)))
    assert actual.shape == (rows, 3, 4)
    if rows:
        close(backend, actual, np.einsum("thi,hio->tho", x.astype(np.float64), matrices))


@BACKENDS
def test_clip_join_columns_and_scale_by_sigmoid_equal_their_definitions(backend):
    x, y, logits = values(4, 6), values(4, 2, seed=1), np.float32([[0], [-200], [200], [1]])
    assert np.abs(backend.clip(x, 0.5)).max() == 0.5
    np.testing.assert_array_equal(backend.join_columns(x, y)[:, 6:], y)
    close(backend, backend.scale_by_sigmoid(x, logits), x / (1 + np.exp(-logits.astype(np.float64))))


@BACKENDS
def test_clamped_swiglu_equals_its_definition(backend):
    gate_up = values(4, 12, scale=3.0)
    gate, up = np.minimum(gate_up[:, :6], 2.0).astype(np.float64), np.clip(gate_up[:, 6:], -2, 2).astype(np.float64)
    expected = (up + 1) * gate / (1 + np.exp(-1.7 * gate))
    close(backend, backend.swiglu(gate_up, Clamp(alpha=1.7, limit=2.0)), expected)


@BACKENDS
def test_swiglu_equals_its_definition_if_the_exponential_overflows(backend):
    gate_up = values(4, 12)
    gate_up[0, 0], gate_up[1, 1] = -200.0, 200.0
    gate, up = gate_up[:, :6].astype(np.float64), gate_up[:, 6:].astype(np.float64)
    close(backend, backend.swiglu(gate_up), gate / (1 + np.exp(-gate)) * up)


@BACKENDS
def test_each_pair_is_rotated_by_position_times_frequency(backend):
    positions, x = np.array([0, 1, 300]), values(3, 2, 8)
    frequencies = 100.0 ** (-np.arange(0, 8, 2, dtype=np.float32) / 8)
    actual = backend.rotate(x, backend.rope_angles(positions, frequencies=frequencies, amplitude=1.0))
    for row, position in enumerate(positions):
        for pair in range(4):
            angle = position * 100.0 ** (-2 * pair / 8)
            rotated = (x[row, :, pair] + 1j * x[row, :, pair + 4]) * np.exp(1j * angle)
            tolerance = 0.02 if backend.is_bfloat16 else 2e-4
            np.testing.assert_allclose(actual[row, :, pair], rotated.real, atol=tolerance)
            np.testing.assert_allclose(actual[row, :, pair + 4], rotated.imag, atol=tolerance)


@BACKENDS
def test_interleaved_rotation_leaves_the_other_numbers_unchanged(backend):
    """Adjacent numbers form pairs; numbers behind the rotated ones are unchanged."""
    positions, x = np.array([0, 1, 9]), values(3, 2, 10)
    frequencies = np.array([1.0, 0.1, 0.01], np.float32)
    angles = backend.rope_angles(positions, frequencies=frequencies, amplitude=1.0)
    actual = backend.rotate(x, angles, interleaved=True)
    rotated = (x[..., 0:6:2] + 1j * x[..., 1:6:2]) * np.exp(1j * positions[:, None, None] * frequencies)
    close(backend, actual[..., 0:6:2], rotated.real)
    close(backend, actual[..., 1:6:2], rotated.imag)
    np.testing.assert_array_equal(actual[..., 6:], x[..., 6:])


def attention_twin(queries, keys, held, scale, *, window=0, sinks=None):
    """Causal attention of a whole sequence, position by position and head by head."""
    length, heads, _ = queries.shape
    shared = heads // keys.shape[1]
    result = np.zeros((length, heads, held.shape[-1]))
    for position in range(length):
        seen = slice(max(0, position + 1 - window) if window else 0, position + 1)
        for head in range(heads):
            scores = keys[seen, head // shared].astype(np.float64) @ queries[position, head] * scale
            powers = np.exp(scores)
            sink = 0.0 if sinks is None else np.exp(float(sinks[head]))
            result[position, head] = powers / (powers.sum() + sink) @ held[seen, head // shared]
    return result


def attend_in_chunks(backend, cache, parts, pages, chunks, **rule):
    """Extend the cache and attend chunk by chunk; `parts` are queries, keys and values of the whole sequence."""
    results, start = [], 0
    for rows in chunks:
        segment, chunk = Segment(row=0, length=rows, start=start, pages=pages), slice(start, start + rows)
        queries, keys, held = (part if part is None else part[chunk] for part in parts)
        backend.extend_cache(cache, keys, held, [segment])
        results.append(backend.attend(queries, cache, [segment], **rule))
        start += rows
    return np.concatenate(results)


@BACKENDS
@pytest.mark.parametrize("chunks", [(150,), (1,) * 9, (70, 1, 1), (5, 130, 1)])
@pytest.mark.parametrize(("window", "with_sinks"), [(0, False), (7, False), (70, True)])
def test_attention_in_chunks_over_scattered_pages_equals_the_twin(backend, chunks, window, with_sinks):
    length = sum(chunks)
    queries, keys, held = values(length, 4, 8), values(length, 2, 8, seed=1), values(length, 2, 8, seed=2)
    sinks = values(4, seed=3) if with_sinks else None
    cache, pages = backend.cache(6, 2, 8), np.array([4, 1, 2])
    cache.keys[:] = cache.values[:] = np.nan if cache.keys.dtype == np.float32 else NAN_BITS
    backend.clear(cache, pages)
    rule = {"scale": 0.3, "window": window, "sinks": sinks}
    actual = attend_in_chunks(backend, cache, (queries, keys, held), pages, chunks, **rule)
    close(backend, actual, attention_twin(queries, keys, held, 0.3, window=window, sinks=sinks))


@BACKENDS
def test_the_values_of_a_latent_cache_are_the_first_numbers_of_its_keys(backend):
    queries, keys = values(20, 4, 8), values(20, 1, 8, seed=1)
    cache, pages = backend.cache(2, 1, 8, latent=5), np.array([1])
    actual = attend_in_chunks(backend, cache, (queries, keys, None), pages, (13, 7), scale=0.3)
    close(backend, actual, attention_twin(queries, keys, keys[..., :5], 0.3))
    backend.clear(cache, pages)
    assert not cache.values.any()


@BACKENDS
@pytest.mark.parametrize("window", [0, 21])
def test_rows_do_not_depend_on_other_rows(backend, window):
    """A row has the same bits alone, among other rows, and for any chunks of its sequence."""
    x, matrix = values(100, 48), backend.matrix(narrow(values(40, 48, seed=1)))
    whole = backend.linear(x, matrix)
    heads = backend.head_matrices(narrow(values(4, 12, 5, seed=2)))
    whole_heads = backend.linear_heads(x.reshape(-1, 4, 12), heads)
    for first, last in [(0, 1), (3, 20), (50, 100), (99, 100)]:
        np.testing.assert_array_equal(backend.linear(x[first:last], matrix), whole[first:last])
        part = backend.linear_heads(x[first:last].reshape(-1, 4, 12), heads)
        np.testing.assert_array_equal(part, whole_heads[first:last])
    rows, pages, results = values(100, 4, 8, seed=3), np.array([0, 1]), []
    for chunks in [(100,), (1,) * 100, (33, 60, 7)]:
        parts = rows, rows[:, :2], rows[:, 2:]
        results.append(
            attend_in_chunks(backend, backend.cache(2, 2, 8), parts, pages, chunks, scale=1.0, window=window)
        )
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@BACKENDS
def test_the_router_chooses_the_lowest_expert_on_a_tie(backend):
    matrix = backend.matrix(narrow(np.eye(5, dtype=np.float32)))
    x = np.array([[1, 3, 3, 0, 3], [0, 0, 0, 0, 0]], np.float32)
    logits = backend.logits(x, matrix)
    experts, weights = backend.choose_experts(logits, Router(top_k=2, renormalize=True))
    np.testing.assert_array_equal(experts, [[1, 2], [0, 1]])
    np.testing.assert_allclose(weights, 0.5)
    _, raw = backend.choose_experts(logits, Router(top_k=2, renormalize=False))
    np.testing.assert_allclose(raw[1], 0.2, rtol=2.0**-8)


@BACKENDS
def test_rows_are_packed_unpacked_and_combined_by_index(backend):
    rows, index, buffer = values(6, 4), np.array([5, 0, 0, 3]), backend.comm_buffer(4, 4)
    assert buffer.ctypes.data % 64 == 0
    backend.pack(rows, index, buffer)
    np.testing.assert_array_equal(backend.unpack(buffer, None), rows[index])
    np.testing.assert_array_equal(backend.unpack(buffer, np.array([3, 1])), rows[[3, 0]])
    output_rows, weights = np.array([[0, 3], [2, 1]]), values(2, 2, seed=4)
    expected = [
        weights[0, 0] * rows[5] + weights[0, 1] * rows[3],
        weights[1, 0] * rows[0] + weights[1, 1] * rows[0],
    ]
    combined = backend.combine(buffer, output_rows, weights)
    close(backend, combined, np.stack(expected))
    shared, residual = backend.add(combined, combined), backend.add(combined[::-1], combined)
    added = backend.combine(buffer, output_rows, weights, (shared, residual))
    np.testing.assert_array_equal(added, backend.add(backend.add(combined, shared), residual))


@BACKENDS
def test_group_sorts_choices_stably(backend):
    source_rows, output_rows, counts = backend.group(np.array([[0, 1], [1, 2], [0, 2]]), np.array([2, 0, 1]), num_ids=3)
    np.testing.assert_array_equal(source_rows, [0, 1, 1, 2, 0, 2])
    np.testing.assert_array_equal(output_rows, [[4, 0], [1, 2], [5, 3]])
    np.testing.assert_array_equal(counts, [2, 2, 2])


@BACKENDS
def test_expert_mlp_applies_each_expert_to_its_rows(backend):
    stored = [(values(12, 8, seed=seed, scale=0.5), values(8, 6, seed=seed + 1, scale=0.5)) for seed in (10, 20, 30)]
    experts = [Expert(backend.matrix(narrow(gate_up)), backend.matrix(narrow(down))) for gate_up, down in stored]
    rows, counts = values(9, 8), np.array([4, 0, 5])
    actual = backend.expert_mlp(rows, experts, counts)
    for part, (gate_up, down) in [(slice(0, 4), stored[0]), (slice(4, 9), stored[2])]:
        hidden = rows[part].astype(np.float64) @ gate_up.T
        expected = hidden[:, :6] / (1 + np.exp(-hidden[:, :6])) * hidden[:, 6:] @ down.T
        np.testing.assert_allclose(actual[part], expected, atol=0.05 if backend.is_bfloat16 else 1e-5)


@pytest.mark.parametrize("width", [SUM_TOKENS, 2 * SUM_TOKENS])
@pytest.mark.parametrize("top", [3, 8])
def test_the_likeliest_tokens_of_pieces_are_those_of_one_piece_whatever_the_logits(width, top):
    vocabulary, random = 3 * SUM_TOKENS + 5, np.random.default_rng(8)
    logits = np.full((6, vocabulary), -np.inf, np.float32)
    special = np.array([np.nan, np.inf, -np.inf, np.finfo(np.float32).max, np.finfo(np.float32).min, 0], np.float32)
    for row in range(6):
        logits[row, ::SUM_TOKENS] = random.permutation(special)[:4]
    logits[4:, : 2 * SUM_TOKENS] = np.nan
    targets, whole, pieces = np.zeros(6, int), *(RowScores(np.zeros(6, int), top=top) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole.add(EXACT.scan(logits, targets, first=0, top=top), first=0, width=vocabulary)
        for first in range(0, vocabulary, width):
            piece = logits[:, first : first + width]
            pieces.add(EXACT.scan(piece, targets, first=first, top=top), first=first, width=piece.shape[1])
        found, expected = pieces.result(), whole.result()
    np.testing.assert_array_equal(found.top_tokens, expected.top_tokens)
    np.testing.assert_array_equal(found.top_logprobs, expected.top_logprobs)
    numbers = np.where(np.isnan(logits), -np.inf, logits.astype(np.float64))
    np.testing.assert_array_equal(found.top_tokens, np.argsort(-numbers, axis=1, kind="stable")[:, :top])


def test_score_returns_the_log_softmax_and_the_most_likely_tokens():
    logits, targets = values(5, 11), np.arange(5)
    scored = EXACT.score(logits, targets, top=11)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(scored.logprobs, exact[np.arange(5), targets], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(exact, scored.top_tokens, 1), scored.top_logprobs, atol=1e-6)
    assert (np.diff(scored.top_logprobs, axis=1) <= 0).all()
