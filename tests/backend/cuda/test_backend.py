"""Every verb of the CUDA backend against the CPU backend, with odd sizes: its kernels run on the CPU by `simt`.

tests/gpu.sh runs the same tests on a GPU.
"""

from functools import reduce

import numpy as np
import pytest

from backend.sampling_twin import requests_of, row_of
from moempi.arrays import narrow, round_to_bfloat16, widen
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cuda import few_rows
from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.cuda.experts import ExpertMlps
from moempi.backend.cuda.launches import BUS_BLOCKS
from moempi.backend.cuda.packing import MOST_CHOICES
from moempi.backend.scores import SUM_TOKENS
from moempi.backend.values import DeltaRates, Expert, RmsNorm, Segment, StateConstants
from moempi.config.architecture import AttentionShape, Clamp, DeltaRule, LongRope, Rope, Router, StateSpace
from moempi.errors import ConfigError
from moempi.model.rope import rope_angles

PRECISIONS = ("bfloat16", "float32")


class Pair:
    """Both backends, and copies of rows from one to the other."""

    def __init__(self, device, precision, *, reproducible=False):
        self.gpu = CudaBackend(device, precision=precision, reproducible=reproducible)
        self.cpu = NumpyBackend(precision=precision)
        self.is_bfloat16 = precision == "bfloat16"

    def values(self, *shape, seed=0, scale=1.0):
        """Random rows of bfloat16 values: for the CPU, and for the GPU."""
        numbers = np.random.default_rng(seed).normal(size=shape) * scale
        rows = round_to_bfloat16(numbers.astype(np.float32))
        return rows, self.gpu.device.upload(narrow(rows) if self.is_bfloat16 else rows)

    def host(self, rows):
        """The rows of the GPU as float32."""
        held = self.gpu.download(rows)
        return widen(held) if held.dtype == np.uint16 else held

    def close(self, actual, expected, *, units=1.0):
        """Equal within `units` times the error of one rounding."""
        actual = self.host(actual)
        assert actual.shape == expected.shape
        tolerance = units * (2.0**-8 if self.is_bfloat16 else 2e-6)
        largest = np.abs(expected).max(initial=0)
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * largest * 0.02)


def assert_same_bits(pair, actual, expected):
    np.testing.assert_array_equal(pair.gpu.download(actual), pair.gpu.download(expected))


@pytest.fixture(params=PRECISIONS)
def pair(request, device):
    return Pair(device, request.param)


@pytest.mark.parametrize("width", [1, 7, 64, 301, 2048, 20_000])
@pytest.mark.parametrize("rounded", [True, False])
def test_rms_norm_equals_the_cpu(pair, width, rounded):
    (x, on_gpu), (weight, gpu_weight) = pair.values(5, width), pair.values(width, seed=1)
    expected = pair.cpu.rms_norm(x, weight, eps=1e-5, rounded=rounded)
    pair.close(pair.gpu.rms_norm(on_gpu, gpu_weight, eps=1e-5, rounded=rounded), expected, units=2)


def test_rms_norm_of_strided_heads_equals_the_cpu(pair):
    (x, on_gpu), (weight, gpu_weight) = pair.values(6, 90), pair.values(10, seed=1)
    heads, gpu_heads = (rows[:, 20:80].reshape(6, 6, 10) for rows in (x, on_gpu))
    pair.close(pair.gpu.rms_norm(gpu_heads, gpu_weight, eps=1e-6), pair.cpu.rms_norm(heads, weight, eps=1e-6), units=2)


@pytest.mark.parametrize("width", [1, 7, 301, 2048, 20_000])
@pytest.mark.parametrize("rounded", [True, False])
def test_add_rms_norm_has_the_bits_of_a_sum_and_its_norm(pair, width, rounded):
    (x, gpu_x), (y, gpu_y), (weight, gpu_weight) = (
        pair.values(5, width),
        pair.values(5, width, seed=1),
        pair.values(width),
    )
    total, normalized = pair.gpu.add_rms_norm(gpu_x, gpu_y, gpu_weight, eps=1e-5, rounded=rounded)
    separate = pair.gpu.add(gpu_x, gpu_y)
    assert_same_bits(pair, total, separate)
    assert_same_bits(pair, normalized, pair.gpu.rms_norm(separate, gpu_weight, eps=1e-5, rounded=rounded))
    expected_total, expected = pair.cpu.add_rms_norm(x, y, weight, eps=1e-5, rounded=rounded)
    pair.close(total, expected_total)
    pair.close(normalized, expected, units=2)


def test_add_rms_norm_of_strided_rows_equals_the_cpu(pair):
    (x, gpu_x), (y, gpu_y), (weight, gpu_weight) = pair.values(6, 90), pair.values(6, 71, seed=1), pair.values(50)
    expected = pair.cpu.add_rms_norm(x[:, 3:53], y[:, 8:58], weight, eps=1e-6)
    actual = pair.gpu.add_rms_norm(gpu_x[:, 3:53], gpu_y[:, 8:58], gpu_weight, eps=1e-6)
    pair.close(actual[0], expected[0])
    pair.close(actual[1], expected[1], units=2)
    none = pair.gpu.add_rms_norm(gpu_x[:0], gpu_x[:0], gpu_x[0], eps=1e-6)
    assert [rows.shape for rows in none] == [(0, 90), (0, 90)]


@pytest.mark.parametrize("width", [9, 256])
def test_layer_norm_equals_the_cpu(pair, width):
    x, weight, bias = (pair.values(*shape, seed=seed) for seed, shape in enumerate([(4, width), (width,), (width,)]))
    expected = pair.cpu.layer_norm(x[0], weight[0], bias[0], eps=1e-5)
    pair.close(pair.gpu.layer_norm(x[1], weight[1], bias[1], eps=1e-5), expected, units=2)


@pytest.mark.parametrize("rows", [0, 1, 9, 130])
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_equals_the_cpu(device, precision, reproducible, rows):
    pair = Pair(device, precision, reproducible=reproducible)
    (x, on_gpu), (bias, gpu_bias) = pair.values(rows, 24), pair.values(16, seed=3)
    weight, extra = narrow(pair.values(10, 24, seed=1)[0]), narrow(pair.values(6, 24, seed=2)[0])
    expected = pair.cpu.matrix(weight, extra)
    for matrix in (pair.gpu.matrix(weight, extra), pair.gpu.matrix(weight.T, extra.T, transposed=True)):
        pair.close(pair.gpu.linear(on_gpu, matrix), pair.cpu.linear(x, expected))
        pair.close(pair.gpu.linear(on_gpu, matrix, gpu_bias), pair.cpu.linear(x, expected, bias))


@pytest.mark.parametrize("rows", [0, 3, 70])
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear_heads_of_strided_rows_equals_the_cpu(device, precision, reproducible, rows):
    pair = Pair(device, precision, reproducible=reproducible)
    (x, on_gpu), (matrices, gpu_matrices) = pair.values(rows, 5, 20), pair.values(5, 12, 9, seed=1)
    expected = pair.cpu.linear_heads(x[..., :12], matrices)
    pair.close(pair.gpu.linear_heads(on_gpu[..., :12], gpu_matrices), expected)


def test_elementwise_functions_of_strided_rows_equal_the_cpu(pair):
    (x, gpu_x), (y, gpu_y) = pair.values(7, 4, 33), pair.values(7, 4, 33, seed=1)
    pair.close(pair.gpu.add(gpu_x, gpu_y), pair.cpu.add(x, y))
    pair.close(pair.gpu.clip(gpu_x[:, 1:, 3:20], 0.7), np.clip(x[:, 1:, 3:20], -0.7, 0.7))
    expected = pair.cpu.join_columns(x[..., :5], y[:, :, 7:30], x[..., 30:])
    np.testing.assert_array_equal(
        pair.host(pair.gpu.join_columns(gpu_x[..., :5], gpu_y[:, :, 7:30], gpu_x[..., 30:])), expected
    )
    (rows, gpu_rows), (logits, gpu_logits) = pair.values(9, 50), pair.values(9, 1, seed=2, scale=3)
    pair.close(pair.gpu.scale_by_sigmoid(gpu_rows, gpu_logits), pair.cpu.scale_by_sigmoid(rows, logits))


@pytest.mark.parametrize("hidden", [5, 264])
@pytest.mark.parametrize("clamp", [None, Clamp(alpha=1.702, limit=1.5)])
def test_swiglu_equals_the_cpu(pair, hidden, clamp):
    x, on_gpu = pair.values(6, 2 * hidden, scale=2)
    pair.close(pair.gpu.swiglu(on_gpu, clamp), pair.cpu.swiglu(x, clamp), units=2)


def test_clamped_swiglu_keeps_nan(pair):
    x = np.array([[np.nan, 1.0, 1.0, np.nan]], np.float32)
    on_gpu = pair.gpu.device.upload(narrow(x) if pair.is_bfloat16 else x)
    assert np.isnan(pair.host(pair.gpu.swiglu(on_gpu, Clamp(alpha=1.702, limit=1.5)))).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("pairs", "dims"), [(4, slice(2, 18)), (8, slice(2, 18)), (8, slice(8, 48)), (32, slice(0, 64))]
)
def test_rotation_equals_the_cpu(pair, interleaved, pairs, dims):
    x, on_gpu = pair.values(5, 3, 72)
    positions, frequencies = np.array([0, 1, 7, 4000, 100_000]), np.float32(10_000) ** -np.linspace(0, 1, pairs)
    angles = (
        backend.rope_angles(positions, frequencies=frequencies.astype(np.float32), amplitude=1.2)
        for backend in (pair.cpu, pair.gpu)
    )
    cpu_angles, gpu_angles = angles
    for on_gpu_angles, expected in zip(gpu_angles, cpu_angles, strict=True):
        np.testing.assert_allclose(pair.host(on_gpu_angles), expected[:, 0], atol=3e-7)
    expected = pair.cpu.rotate(x[..., dims], cpu_angles, interleaved=interleaved)
    pair.close(pair.gpu.rotate(on_gpu[..., dims], gpu_angles, interleaved=interleaved), expected, units=2)


def test_angles_of_short_and_long_sequences_are_joined_on_the_gpu(pair):
    long = LongRope(original_positions=8, divisors=(2.0, 3.0, 4.0, 5.0), amplitude=1.5)
    attention = AttentionShape(2, 2, 8, rope=Rope(long=long))
    given = attention, np.array([0, 1, 7, 4000, 2]), np.array([9, 9, 8, 5000, 3])
    for on_gpu, expected in zip(rope_angles(pair.gpu, *given), rope_angles(pair.cpu, *given), strict=True):
        np.testing.assert_allclose(pair.host(on_gpu), expected[:, 0], atol=3e-7)


def test_frequencies_are_uploaded_once_for_each_queue(pair, monkeypatch):
    positions, frequencies, uploads = np.arange(3), np.array([1.0, 0.5], np.float32), []
    upload = pair.gpu.device.upload
    monkeypatch.setattr(pair.gpu.device, "upload", lambda values: uploads.append(values.dtype.name) or upload(values))
    for queue in (0, 1, 0, 1):
        with pair.gpu.on_queue(queue):
            cosines, _ = pair.gpu.rope_angles(positions, frequencies=frequencies, amplitude=1.0)
            np.testing.assert_allclose(pair.host(cosines), np.cos(np.outer(positions, frequencies)), atol=3e-7)
    assert uploads.count("float32") == 2
    other, _ = pair.gpu.rope_angles(positions, frequencies=2 * frequencies, amplitude=1.0)
    np.testing.assert_allclose(pair.host(other), np.cos(np.outer(positions, 2 * frequencies)), atol=3e-7)


def cached(pair, *, heads, dim, lengths, scattered, latent=0):
    """Filled caches of both backends, and the segments of their last rows; pages are not adjacent if `scattered`."""
    page_counts = [-(-total // 64) for total, _ in lengths]
    order = np.random.default_rng(5).permutation(sum(page_counts)) if scattered else np.arange(sum(page_counts))
    caches = [backend.cache(sum(page_counts), heads, dim, latent=latent) for backend in (pair.cpu, pair.gpu)]
    history, last, row, row_before = [], [], 0, 0
    for pages, (total, new) in zip(np.split(order, np.cumsum(page_counts)[:-1]), lengths, strict=True):
        if total > new:
            history.append(Segment(row_before, total - new, 0, pages))
        last.append(Segment(row, new, total - new, pages))
        row, row_before = row + new, row_before + total - new
    for number, segments in enumerate((history, last)):
        rows = sum(segment.length for segment in segments)
        (keys, gpu_keys), (values, gpu_values) = (pair.values(rows, heads, dim, seed=10 * number + s) for s in (1, 2))
        pair.cpu.extend_cache(caches[0], keys, None if latent else values, segments)
        pair.gpu.extend_cache(caches[1], gpu_keys, None if latent else gpu_values, segments)
    return caches, last


@pytest.mark.parametrize("window", [0, 70], ids=["whole", "window"])
@pytest.mark.parametrize(
    ("query_heads", "heads", "dim", "lengths"),
    [
        (4, 4, 16, [(1, 1), (64, 1), (300, 1), (65, 1)]),  # decode
        (6, 1, 24, [(130, 3), (20, 20)]),  # many heads on one, few new rows
        (4, 2, 32, [(40, 40), (200, 130), (17, 16), (90, 1)]),  # prefill in tiles, and a single row
        (2, 2, 128, [(70, 70)]),
        (4, 2, 64, [(330, 200), (90, 1), (17, 17)]),  # tiles of warpgroups
        (2, 1, 128, [(300, 140)]),
        (2, 2, 20, [(300, 1), (70, 2)]),  # rows that are not aligned
        (3, 1, 264, [(130, 1)]),  # rows that a warp reads in several steps
    ],
)
def test_attention_equals_the_cpu(pair, query_heads, heads, dim, lengths, window):
    caches, segments = cached(pair, heads=heads, dim=dim, lengths=lengths, scattered=True)
    rows = sum(new for _, new in lengths)
    (queries, gpu_queries), (sinks, gpu_sinks) = pair.values(rows, query_heads, dim, seed=3), pair.values(query_heads)
    for with_sinks in (False, True):
        rule = {"scale": dim**-0.5, "window": window}
        expected = pair.cpu.attend(queries, caches[0], segments, sinks=sinks if with_sinks else None, **rule)
        actual = pair.gpu.attend(gpu_queries, caches[1], segments, sinks=gpu_sinks if with_sinks else None, **rule)
        assert actual.shape == expected.shape
        np.testing.assert_allclose(pair.host(actual), expected, atol=0.012 if pair.is_bfloat16 else 2e-6)


@pytest.mark.parametrize("dim", [64, 128])
def test_the_tile_kernels_are_equal(device, monkeypatch, dim):
    pair = Pair(device, "bfloat16")
    caches, segments = cached(pair, heads=2, dim=dim, lengths=[(260, 200), (64, 64)], scattered=True)
    _, queries = pair.values(264, 2, dim, seed=3)
    of_warpgroups = pair.host(pair.gpu.attend(queries, caches[1], segments, scale=dim**-0.5))
    monkeypatch.setattr(device, "has_warpgroups", False)
    of_warps = pair.host(pair.gpu.attend(queries, caches[1], list(segments), scale=dim**-0.5))
    np.testing.assert_allclose(of_warpgroups, of_warps, atol=0.008)


@pytest.mark.parametrize(("dim", "latent"), [(40, 32), (576, 512)])
def test_attention_over_a_latent_cache_equals_the_cpu(pair, dim, latent):
    caches, segments = cached(pair, heads=1, dim=dim, lengths=[(20, 20), (300, 1)], scattered=True, latent=latent)
    queries, gpu_queries = pair.values(21, 5, dim, seed=3)
    expected = pair.cpu.attend(queries, caches[0], segments, scale=0.04)
    actual = pair.gpu.attend(gpu_queries, caches[1], segments, scale=0.04)
    np.testing.assert_allclose(pair.host(actual), expected, atol=0.012 if pair.is_bfloat16 else 2e-6)


def test_a_reproducible_row_of_attention_does_not_depend_on_its_batch(device):
    pair = Pair(device, "bfloat16", reproducible=True)
    caches, segments = cached(pair, heads=2, dim=16, lengths=[(300, 40), (64, 20)], scattered=True)
    _, queries = pair.values(60, 2, 16, seed=3)
    together = pair.gpu.download(pair.gpu.attend(queries, caches[1], segments, scale=0.25))
    for row in (0, 17, 39):
        alone = [Segment(0, 1, segments[0].start + row, segments[0].pages)]
        single = pair.gpu.download(pair.gpu.attend(queries[row : row + 1], caches[1], alone, scale=0.25))
        np.testing.assert_array_equal(single[0], together[row])


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_row_within_one_split_does_not_depend_on_a_longer_one_beside_it(pair, with_sinks):
    """Alone its output is written at once; beside a row of several splits it is merged."""
    caches, segments = cached(pair, heads=2, dim=16, lengths=[(200, 1), (600, 1)], scattered=True)
    _, queries = pair.values(2, 4, 16, seed=3)
    sinks = pair.values(4)[1] if with_sinks else None
    together = pair.gpu.download(pair.gpu.attend(queries, caches[1], segments, scale=0.25, sinks=sinks))
    alone = pair.gpu.download(pair.gpu.attend(queries[:1], caches[1], segments[:1], scale=0.25, sinks=sinks))
    np.testing.assert_array_equal(alone[0], together[0])


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(
    ("query_heads", "heads", "dim", "lengths"),
    [
        (3, 3, 16, [(700, 2), (1, 1), (513, 1), (256, 1), (257, 1)]),
        (6, 1, 24, [(700, 2), (300, 1)]),  # groups of four heads and of two
        (10, 2, 7, [(1, 1), (520, 1)]),
        (4, 2, 264, [(257, 1)]),  # more columns than threads
        (1, 1, 8, [(9000, 1)]),  # more splits than lanes of a warp
    ],
)
def test_the_last_block_of_a_row_adds_up_its_splits(pair, query_heads, heads, dim, lengths, window):
    """Again and again: its counters are zero after each launch."""
    caches, segments = cached(pair, heads=heads, dim=dim, lengths=lengths, scattered=True)
    rows = sum(new for _, new in lengths)
    (queries, gpu_queries), (sinks, gpu_sinks) = pair.values(rows, query_heads, dim, seed=3), pair.values(query_heads)
    rule = {"scale": dim**-0.5, "window": window}
    for with_sinks in (False, True):
        expected = pair.cpu.attend(queries, caches[0], segments, sinks=sinks if with_sinks else None, **rule)
        given = (gpu_queries, caches[1], segments)
        attended = [pair.gpu.attend(*given, sinks=gpu_sinks if with_sinks else None, **rule) for _ in range(3)]
        np.testing.assert_allclose(pair.host(attended[0]), expected, atol=0.012 if pair.is_bfloat16 else 2e-6)
        for again in attended[1:]:
            assert_same_bits(pair, again, attended[0])
    assert not pair.gpu.download(pair.gpu._launches.counters(1)).any()


def test_the_counters_of_a_queue_are_its_own(device):
    launches = Pair(device, "bfloat16").gpu._launches
    counters = launches.counters(5)
    assert len(counters) >= 5
    assert launches.counters(3) is counters
    larger = launches.counters(2 * len(counters))
    assert not device.download(larger).any()
    device.use_queue(1)
    assert launches.counters(3) is not larger


@pytest.mark.parametrize("limit", ["MOST_BLOCKS", "PARTIAL_BYTES"])
def test_rows_of_several_launches_equal_those_of_one(device, monkeypatch, limit):
    pair = Pair(device, "bfloat16", reproducible=True)
    caches, segments = cached(pair, heads=2, dim=16, lengths=[(300, 7)], scattered=True)
    _, queries = pair.values(7, 2, 16, seed=3)
    together = pair.gpu.download(pair.gpu.attend(queries, caches[1], segments, scale=0.25))
    monkeypatch.setattr(f"moempi.backend.cuda.attention.{limit}", 3 if limit == "MOST_BLOCKS" else 600)
    apart = pair.gpu.download(pair.gpu.attend(queries, caches[1], segments, scale=0.25))
    np.testing.assert_array_equal(apart, together)


def test_keys_beyond_a_row_and_before_its_window_are_not_read_into_it(pair):
    caches, segments = cached(pair, heads=2, dim=16, lengths=[(200, 1)], scattered=False)
    _, queries = pair.values(1, 2, 16, seed=3)
    before = pair.gpu.download(pair.gpu.attend(queries, caches[1], segments, scale=0.25, window=90))
    nan, later = pair.gpu.upload(np.full((200, 2, 16), np.nan, np.float32)), [Segment(0, 56, 200, segments[0].pages)]
    if pair.is_bfloat16:
        nan = pair.gpu.device.upload(np.full((200, 2, 16), 0x7FFF, np.uint16))
    pair.gpu.extend_cache(caches[1], nan[:56], nan[:56], later)
    pair.gpu.extend_cache(caches[1], nan[:110], nan[:110], [Segment(0, 110, 0, segments[0].pages)])
    after = pair.gpu.download(pair.gpu.attend(queries, caches[1], segments, scale=0.25, window=90))
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("first", [0, 8, 3])
def test_a_cache_is_extended_by_strided_rows_of_any_alignment(pair, first):
    segments = [Segment(0, 70, 3, np.array([1, 0]))]
    (rows, gpu_rows), (packed, gpu_packed) = pair.values(70, 3, 40), pair.values(70, 200, seed=1)
    parts = [(rows[..., first : first + 24], packed[:, first : first + 72].reshape(70, 3, 24))]
    parts.append((gpu_rows[..., first : first + 24], gpu_packed[:, first : first + 72].reshape(70, 3, 24)))
    cache = pair.gpu.cache(2, 3, 24)
    pair.gpu.extend_cache(cache, *parts[1], segments)
    expected = np.zeros((2, 64, 3, 24), np.float32)
    for held, new in zip((cache.keys, cache.values), parts[0], strict=True):
        expected[1, 3:], expected[0, :9] = new[:61], new[61:]
        np.testing.assert_array_equal(pair.host(held).reshape(expected.shape), expected)


DECODED, ADDED = [(70, 1), (200, 1), (64, 1), (65, 1)], [(130, 100), (3, 2)]


@pytest.mark.parametrize("normalizes", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "pairs", "lengths"),
    [
        (4, 4, 16, 8, DECODED),
        (6, 2, 24, 8, ADDED),
        (8, 1, 80, 16, DECODED),
        (3, 3, 12, 4, ADDED),
        (5, 1, 7, 3, DECODED),
        (1, 1, 2, 1, [(1, 1)]),
        (16, 16, 128, 64, ADDED),
    ],
)
def test_rotation_into_the_cache_has_the_bits_of_rotation_and_extension(
    pair, heads, kv_heads, dim, pairs, lengths, interleaved, normalizes
):
    """Queries, keys and values are views of one product; only the new rows of the cache are written."""
    (caches, segments), ((_, separate), _) = (
        cached(pair, heads=kv_heads, dim=dim, lengths=lengths, scattered=True) for _ in range(2)
    )
    rows = sum(new for _, new in lengths)
    together = [x.reshape(rows, heads + 2 * kv_heads, dim) for x in pair.values(rows, (heads + 2 * kv_heads) * dim)]
    cpu_parts, gpu_parts = ((x[:, :heads], x[:, heads:-kv_heads], x[:, -kv_heads:]) for x in together)
    positions = np.concatenate([np.arange(total - new, total) for total, new in lengths])
    frequencies = np.float32(100) ** -np.linspace(0, 1, pairs).astype(np.float32)
    cpu_angles, gpu_angles = (
        backend.rope_angles(positions, frequencies=frequencies, amplitude=1.2) for backend in (pair.cpu, pair.gpu)
    )
    cpu_weights, gpu_weights = zip(*(pair.values(dim, seed=seed) for seed in (7, 8)), strict=True)
    cpu_norms, gpu_norms = (
        tuple(RmsNorm(weight, 1e-5) for weight in weights) if normalizes else None
        for weights in (cpu_weights, gpu_weights)
    )
    given = {"segments": segments, "interleaved": interleaved}
    expected = pair.cpu.rotate_into_cache(cpu_parts, cpu_angles, cache=caches[0], norms=cpu_norms, **given)
    actual = pair.gpu.rotate_into_cache(gpu_parts, gpu_angles, cache=caches[1], norms=gpu_norms, **given)
    plain = list(gpu_parts[:2])
    if normalizes:
        plain = [pair.gpu.rms_norm(*both, eps=1e-5) for both in zip(plain, gpu_weights, strict=True)]
    queries, keys = (pair.gpu.rotate(part, gpu_angles, interleaved=interleaved) for part in plain)
    pair.gpu.extend_cache(separate, keys, gpu_parts[2], segments)
    for one, other in ((actual, queries), (caches[1].keys, separate.keys), (caches[1].values, separate.values)):
        assert_same_bits(pair, one, other)
    pair.close(caches[1].values, caches[0].values)
    for one, other in ((actual, expected), (caches[1].keys, caches[0].keys)):
        if normalizes:  # one rounding of a normalized number may become larger beside the difference of two
            atol = (2.0**-7 if pair.is_bfloat16 else 4e-6) * np.abs(other).max()
            np.testing.assert_allclose(pair.host(one), other, atol=atol)
        else:
            pair.close(one, other, units=2)


@pytest.mark.parametrize("first", [0, 8, 3])
def test_rotation_into_the_cache_takes_rows_of_any_alignment(pair, first):
    """Queries and keys are normalized into memory of their own, or strided; values are a view."""
    (x, gpu_x), segments = pair.values(9, 4, 40), [Segment(0, 9, 60, np.array([1, 0]))]
    (queries, gpu_queries), keys, gpu_keys = pair.values(9, 8, 16, seed=1), x[:, :2, :16], gpu_x[:, :2, :16]
    values, gpu_values = (rows[:, 2:, first : first + 16] for rows in (x, gpu_x))
    caches = [backend.cache(2, 2, 16) for backend in (pair.cpu, pair.gpu)]
    angles = [
        backend.rope_angles(np.arange(60, 69), frequencies=np.ones(8, np.float32), amplitude=1.0)
        for backend in (pair.cpu, pair.gpu)
    ]
    expected = pair.cpu.rotate_into_cache((queries, keys, values), angles[0], cache=caches[0], segments=segments)
    gpu_heads = (gpu_queries, gpu_keys, gpu_values)
    actual = pair.gpu.rotate_into_cache(gpu_heads, angles[1], cache=caches[1], segments=segments)
    pair.close(actual, expected, units=2)
    pair.close(caches[1].keys, caches[0].keys, units=2)
    np.testing.assert_array_equal(pair.host(caches[1].values), caches[0].values)
    none, no_angles = [part[:0] for part in gpu_heads], [part[:0] for part in angles[1]]
    assert pair.gpu.rotate_into_cache(none, no_angles, cache=caches[1], segments=()).shape == (0, 8, 16)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("query_dim", "kept", "dim", "pairs", "lengths"),
    [
        (48, 32, 8, 4, DECODED),
        (0, 32, 16, 8, ADDED),
        (5, 9, 7, 3, ADDED),
        (0, 1, 2, 1, [(1, 1)]),
        (1536, 512, 64, 32, DECODED),
        (20_000, 512, 64, 32, [(1, 1)]),
    ],
)
def test_extending_a_latent_cache_has_the_bits_of_its_parts(pair, query_dim, kept, dim, pairs, lengths, interleaved):
    """Queries and keys are columns of one product."""
    width, rows = kept + dim, sum(new for _, new in lengths)
    (caches, segments), ((_, separate), _) = (
        cached(pair, heads=1, dim=width, lengths=lengths, scattered=True, latent=kept) for _ in range(2)
    )
    down = pair.values(rows, query_dim + width, seed=4)
    keys = [(of_keys[..., :kept], of_keys[..., kept:]) for of_keys in (both[:, None, query_dim:] for both in down)]
    angles = angles_of(pair, pairs, lengths)
    weights, query_weights = pair.values(kept, seed=8), pair.values(query_dim, seed=9)
    found = []
    for number, backend in enumerate((pair.cpu, pair.gpu)):
        norm, query_norm = RmsNorm(weights[number], 1e-5), RmsNorm(query_weights[number], 1e-6)
        queries = (down[number][:, :query_dim], query_norm) if query_dim else None
        given = {"norm": norm, "cache": caches[number], "segments": segments, "interleaved": interleaved}
        found.append(backend.extend_latent_cache(keys[number], angles[number], queries=queries, **given))
    kept_keys, rotary = keys[1]
    vectors = pair.gpu.rms_norm(kept_keys, weights[1], eps=1e-5)
    rotated = pair.gpu.rotate(rotary, angles[1], interleaved=interleaved)
    pair.gpu.extend_cache(separate, pair.gpu.join_columns(vectors, rotated), None, segments)
    assert_same_bits(pair, caches[1].keys, separate.keys)
    pair.close(caches[1].keys, caches[0].keys, units=2)
    if query_dim:
        assert_same_bits(pair, found[1], pair.gpu.rms_norm(down[1][:, :query_dim], query_weights[1], eps=1e-6))
        pair.close(found[1], found[0], units=2)
    else:
        assert found == [None, None]


def angles_of(pair, pairs, lengths):
    """The angles of the last rows of sequences, of the CPU and of the GPU."""
    positions = np.concatenate([np.arange(total - new, total) for total, new in lengths])
    frequencies = np.float32(100) ** -np.linspace(0, 1, pairs).astype(np.float32)
    return [backend.rope_angles(positions, frequencies=frequencies, amplitude=1.2) for backend in (pair.cpu, pair.gpu)]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("heads", "kept", "dim", "pairs", "lengths"),
    [
        (5, 32, 8, 4, [(20, 20), (300, 1)]),
        (4, 32, 16, 5, [(700, 2), (1, 1)]),
        (3, 9, 7, 3, [(130, 3)]),
        (8, 512, 64, 32, [(300, 1), (64, 1)]),
    ],
)
def test_queries_rotated_by_attention_have_the_bits_of_rotated_queries(
    pair, heads, kept, dim, pairs, lengths, interleaved
):
    """The rotated parts are columns of a product of all heads; its other columns are absorbed."""
    caches, segments = cached(pair, heads=1, dim=kept + dim, lengths=lengths, scattered=True, latent=kept)
    rows, other, angles = sum(new for _, new in lengths), 6, angles_of(pair, pairs, lengths)
    absorbed, products = pair.values(rows, heads, kept, seed=3), pair.values(rows, heads, other + dim, seed=4)
    cpu_parts, gpu_parts = ((absorbed[n], products[n][..., other:]) for n in range(2))
    rule = {"scale": 0.04, "interleaved": interleaved}
    expected = pair.cpu.attend_latent(cpu_parts, angles[0], caches[0], segments, **rule)
    actual = pair.gpu.attend_latent(gpu_parts, angles[1], caches[1], segments, **rule)
    rotated = pair.gpu.rotate(gpu_parts[1], angles[1], interleaved=interleaved)
    joined = pair.gpu.join_columns(gpu_parts[0], rotated)
    assert_same_bits(pair, actual, pair.gpu.attend(joined, caches[1], segments, scale=0.04))
    np.testing.assert_allclose(pair.host(actual), expected, atol=0.012 if pair.is_bfloat16 else 4e-6)


@pytest.mark.parametrize("limit", ["MOST_BLOCKS", "PARTIAL_BYTES"])
def test_rotated_rows_of_several_launches_equal_those_of_one(device, monkeypatch, limit):
    pair, lengths = Pair(device, "bfloat16"), [(300, 7)]
    caches, segments = cached(pair, heads=1, dim=40, lengths=lengths, scattered=True, latent=32)
    queries, angles = (pair.values(7, 2, 32)[1], pair.values(7, 2, 8, seed=1)[1]), angles_of(pair, 4, lengths)[1]
    given = (queries, angles, caches[1], segments)
    together = pair.gpu.download(pair.gpu.attend_latent(*given, scale=0.25))
    monkeypatch.setattr(f"moempi.backend.cuda.attention.{limit}", 3 if limit == "MOST_BLOCKS" else 600)
    np.testing.assert_array_equal(pair.gpu.download(pair.gpu.attend_latent(*given, scale=0.25)), together)


def test_cleared_pages_are_zero(pair):
    caches, _ = cached(pair, heads=2, dim=24, lengths=[(200, 1)], scattered=False)
    pair.gpu.clear(caches[1], np.array([2, 0]))
    keys = pair.host(caches[1].keys).reshape(4, 64, 2, 24)
    assert not keys[[0, 2]].any()
    assert keys[1].all()


ROUTERS = [
    Router(top_k=3),
    Router(top_k=3, renormalize=True, float32_logits=True, float32_weights=True),
    Router(top_k=4, scaling=16.0, num_groups=4, kept_groups=2),
    Router(top_k=4, scoring="sigmoid", correction=True, renormalize=True, scaling=2.5),
    Router(top_k=5, scoring="sigmoid", correction=True, num_groups=3, kept_groups=2, group_score="top2"),
    Router(top_k=4, scoring="softmax_chosen"),
    Router(top_k=12, correction=True, renormalize=True, least_sum=0.9),
    Router(top_k=2, scoring="sparsemixer", float32_weights=True),
]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("rows", [0, 1, 42])
def test_the_router_equals_the_cpu(pair, router, rows):
    (x, gpu_x), (bias, gpu_bias) = pair.values(rows, 20), pair.values(12, seed=2)
    weight = pair.values(12, 20, seed=1)[0]
    stored = weight if router.float32_logits else narrow(weight)
    logits = pair.cpu.logits(x, pair.cpu.matrix(stored), bias)
    gpu_logits = pair.gpu.logits(gpu_x, pair.gpu.matrix(stored), gpu_bias)
    np.testing.assert_allclose(pair.host(gpu_logits), logits, rtol=2.0**-8, atol=1e-5)
    # From here on both see the same logits, with ties.
    logits[:, 3] = logits[:, 8]
    logits[::5] = 0
    gpu_logits = pair.gpu.upload(logits)
    rng = np.random.default_rng(3)
    correction = rng.normal(size=12).astype(np.float32) if router.correction else None
    selection_bias = rng.normal(size=12).astype(np.float32) if router.correction else None
    given = None if correction is None else pair.gpu.tensor(correction)
    experts, weights = pair.cpu.choose_experts(logits, router, correction=correction, selection_bias=selection_bias)
    gpu_experts, gpu_weights = pair.gpu.choose_experts(
        gpu_logits, router, correction=given, selection_bias=selection_bias
    )
    np.testing.assert_array_equal(pair.gpu.download(gpu_experts), experts)
    tolerance = 2.0**-8 if pair.is_bfloat16 and not router.float32_weights else 2e-6
    np.testing.assert_allclose(pair.gpu.download(gpu_weights), weights, rtol=tolerance)
    if router.scoring != "sparsemixer":
        chosen = np.stack([rng.permutation(12)[: router.top_k] for _ in range(rows)]) if rows else experts
        again = pair.gpu.weigh_experts(gpu_logits, pair.gpu.upload(chosen), router)
        np.testing.assert_allclose(
            pair.gpu.download(again), pair.cpu.weigh_experts(logits, chosen, router), rtol=tolerance
        )


@pytest.mark.parametrize("float32_logits", [False, True])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "softmax_chosen", "sparsemixer"])
def test_logits_are_rounded_before_experts_are_chosen_and_weighed(pair, scoring, float32_logits):
    """Numbers 1 and 2 are equal when they are rounded to bfloat16, and the first of two that are equal is chosen."""
    logits = np.float32([[0.3, 1, 1.001, 0.3003], [0.3, 1.001, 1, 0.3003]])
    router = Router(top_k=2, scoring=scoring, float32_logits=float32_logits, float32_weights=True)
    keeps = float32_logits or not pair.is_bfloat16
    for backend in (pair.cpu, pair.gpu):
        experts, weights = backend.choose_experts(backend.upload(logits), router)
        assert backend.download(experts).tolist() == ([[2, 1], [1, 2]] if keeps else [[1, 2], [1, 2]])
        first, second = backend.download(weights)
        np.testing.assert_allclose(second, first, rtol=1e-6)
        assert (first[0] == first[1]) == (not keeps and scoring != "sparsemixer")
        if scoring != "sparsemixer":
            again = backend.download(backend.weigh_experts(backend.upload(logits), experts, router))
            np.testing.assert_allclose(again, [first, second], rtol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 33, 700, 3000])
@pytest.mark.parametrize("num_ids", [1, 5, 300, 2500])
def test_group_and_pick_replicas_equal_the_cpu(pair, rows, num_ids):
    rng = np.random.default_rng(rows)
    experts, physical_ids = rng.integers(0, 16, (rows, 3)).astype(np.int32), rng.integers(0, num_ids, 16)
    physical_ids[0] = num_ids - 1
    expected = pair.cpu.group(experts, physical_ids, num_ids=num_ids)
    actual = pair.gpu.group(pair.gpu.upload(experts), physical_ids, num_ids=num_ids)
    for found, right in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(pair.gpu.download(found), right)
    replicas = pair.gpu.pick_replicas(pair.gpu.upload(experts), 3)
    np.testing.assert_array_equal(pair.gpu.download(replicas), pair.cpu.pick_replicas(experts, 3))


@pytest.mark.parametrize(
    ("rows", "slots", "num_ids", "width"),
    [(1, 1, 1, 12), (1, 8, 300, 9000), (33, 3, 5, 1), (64, 8, 256, 24), (MOST_CHOICES // 4, 4, 2500, 8)],
)
def test_rows_are_packed_in_the_order_of_their_experts(pair, rows, slots, num_ids, width):
    rng = np.random.default_rng(rows)
    experts, physical_ids = rng.integers(0, 64, (rows, slots)).astype(np.int32), rng.integers(0, num_ids, 64)
    physical_ids[0] = num_ids - 1
    (x, on_gpu), out = pair.values(rows, width), pair.gpu.rows_in(pair.gpu.row_buffer(rows * slots, width))
    expected = pair.cpu.group(experts, physical_ids, num_ids=num_ids)
    chosen = pair.gpu.upload(experts)
    found = pair.gpu.group_and_pack(on_gpu, chosen, pair.gpu.upload(physical_ids), out, num_ids=num_ids)
    buffer = pair.cpu.comm_buffer(rows * slots, width)
    twin = pair.cpu.group_and_pack(x, experts, physical_ids, buffer, num_ids=num_ids)
    for on_device, on_cpu, right in zip(found, twin, expected[1:], strict=True):
        np.testing.assert_array_equal(pair.gpu.download(on_device), right)
        np.testing.assert_array_equal(on_cpu, right)
    np.testing.assert_array_equal(pair.host(out), x[expected[0]])
    np.testing.assert_array_equal(pair.cpu.unpack(buffer, None), x[expected[0]])


def test_group_refuses_more_experts_than_its_kernel_takes(device):
    gpu = Pair(device, "bfloat16").gpu
    with pytest.raises(ConfigError, match="at most 8192"):
        gpu.group(gpu.upload(np.zeros((1, 1), np.int32)), np.zeros(1, np.int32), num_ids=8193)


@pytest.mark.parametrize("width", [1, 12, 300, 9000])
def test_packing_and_unpacking_leave_rows_unchanged(pair, width):
    rows = np.arange(9 * width, dtype=np.float32).reshape(9, width) % 256
    on_gpu = pair.gpu.device.upload(narrow(rows) if pair.is_bfloat16 else rows)
    index = np.array([8, 0, 3, 3, 7, 1])
    buffer = pair.gpu.comm_buffer(6, width)
    pair.gpu.pack(on_gpu, index, buffer)
    np.testing.assert_array_equal(pair.host(pair.gpu.unpack(buffer, None)), rows[index])
    np.testing.assert_array_equal(pair.host(pair.gpu.unpack(buffer, np.array([5, 0]))), rows[[1, 8]])
    np.testing.assert_array_equal(pair.host(pair.gpu.embed(index, on_gpu)), rows[index])
    joined = pair.gpu.join([on_gpu[2:4], on_gpu[:0], on_gpu[5:]])
    np.testing.assert_array_equal(pair.host(joined), rows[[2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("width", [300, 9000])
def test_rows_cross_the_bus_in_few_blocks(pair, monkeypatch, width):
    """So that blocks which wait for the bus leave the GPU to other lanes. In device memory each row has its own."""
    device, blocks = pair.gpu.device, []
    launch = device.launch
    monkeypatch.setattr(
        device, "launch", lambda kernel, grid, *given: (blocks.append(grid), launch(kernel, grid, *given))
    )
    rows, index = np.arange(300 * width, dtype=np.float32).reshape(300, width) % 256, np.arange(300)[::-1]
    on_gpu, buffer = (
        pair.gpu.device.upload(narrow(rows) if pair.is_bfloat16 else rows),
        pair.gpu.comm_buffer(300, width),
    )
    pair.gpu.pack(on_gpu, index, buffer)
    np.testing.assert_array_equal(pair.host(pair.gpu.unpack(buffer, index)), rows)
    pair.gpu.pack(on_gpu, index, pair.gpu.row_buffer(300, width))
    segments = -(-width * on_gpu.itemsize // 8192)
    few = -(-BUS_BLOCKS // segments) if device.comm_buffers_on_host else 300
    assert blocks == [(few, segments, 1), (few, segments, 1), (300, segments, 1)]


def test_a_comm_buffer_is_written_once_the_event_is_done(pair):
    _, rows = pair.values(5, 16)
    buffer = pair.gpu.comm_buffer(5, 16)
    pair.gpu.pack(pair.gpu.add(rows, rows), None, buffer)
    pair.gpu.record_event().synchronize()
    written = np.array(buffer) if isinstance(buffer, np.ndarray) else pair.gpu.download(buffer)
    assert np.isfinite(widen(written) if pair.is_bfloat16 else written).all()


@pytest.mark.parametrize(("width", "slots"), [(50, 3), (2056, 8), (24, 19)])
def test_combine_equals_the_cpu(pair, width, slots):
    (buffer, gpu_buffer), output_rows = pair.values(20, width), np.random.default_rng(1).integers(0, 20, (7, slots))
    weights = np.random.default_rng(2).random((7, slots), np.float32)
    sent = narrow(buffer) if pair.is_bfloat16 else buffer
    expected = pair.cpu.combine(sent, output_rows, weights)
    pair.close(pair.gpu.combine(gpu_buffer, pair.gpu.upload(output_rows), pair.gpu.upload(weights)), expected)


@pytest.mark.parametrize("num_addends", [1, 2])
@pytest.mark.parametrize("width", [1, 7, 301, 2048, 20_000])
def test_combine_adds_with_the_bits_of_separate_sums(pair, width, num_addends):
    (buffer, gpu_buffer), output_rows = pair.values(20, width), np.random.default_rng(1).integers(0, 20, (7, 3))
    weights = np.random.default_rng(2).random((7, 3), np.float32)
    addends, gpu_addends = zip(*[pair.values(7, width, seed=3 + n) for n in range(num_addends)], strict=True)
    choices = pair.gpu.upload(output_rows), pair.gpu.upload(weights)
    actual = pair.gpu.combine(gpu_buffer, *choices, gpu_addends)
    assert_same_bits(pair, actual, reduce(pair.gpu.add, gpu_addends, pair.gpu.combine(gpu_buffer, *choices)))
    sent = narrow(buffer) if pair.is_bfloat16 else buffer
    expected = pair.cpu.combine(sent, output_rows, weights, addends)
    pair.close(actual, expected, units=2)


@pytest.mark.parametrize("num_addends", [0, 1, 2])
@pytest.mark.parametrize(("width", "slots"), [(1, 3), (7, 9), (301, 3), (2048, 8), (20_000, 2)])
def test_combine_rms_norm_has_the_bits_of_sums_and_their_norm(pair, width, slots, num_addends):
    (buffer, gpu_buffer), output_rows = pair.values(20, width), np.random.default_rng(1).integers(0, 20, (7, slots))
    weights = np.random.default_rng(2).random((7, slots), np.float32)
    (weight, gpu_weight), rounded = pair.values(width, seed=9), num_addends != 1
    both = [pair.values(7, width, seed=3 + n) for n in range(num_addends)]
    addends, gpu_addends = [one for one, _ in both], [other for _, other in both]
    choices = pair.gpu.upload(output_rows), pair.gpu.upload(weights)
    norm, gpu_norm = RmsNorm(weight, 1e-5, rounded), RmsNorm(gpu_weight, 1e-5, rounded)
    total, normalized = pair.gpu.combine_rms_norm(gpu_buffer, *choices, gpu_addends, gpu_norm)
    separate = pair.gpu.combine(gpu_buffer, *choices, gpu_addends)
    assert_same_bits(pair, total, separate)
    assert_same_bits(pair, normalized, pair.gpu.rms_norm(separate, gpu_weight, eps=1e-5, rounded=rounded))
    sent = narrow(buffer) if pair.is_bfloat16 else buffer
    expected_total, expected = pair.cpu.combine_rms_norm(sent, output_rows, weights, addends, norm)
    pair.close(total, expected_total, units=2)
    pair.close(normalized, expected, units=3)


def test_the_nan_of_a_gpu_stays_nan(device):
    """Arithmetic on a GPU makes the NaN 0x7fffffff; rounding by adding to its bits would make it -0."""
    pair = Pair(device, "bfloat16")
    nan = np.array([[0x7FFFFFFF]], np.uint32).view(np.float32)
    buffer, rows = pair.values(1, 50)[1], pair.gpu.upload(np.zeros((1, 1), np.int32))
    assert np.isnan(pair.host(pair.gpu.combine(buffer, rows, pair.gpu.upload(nan)))).all()
    assert np.isnan(pair.host(pair.gpu.combine(buffer[:, :7], rows, pair.gpu.upload(nan)))).all()
    router = Router(top_k=1, scoring="sigmoid")
    logits = pair.gpu.logits(pair.gpu.upload(nan), pair.gpu.matrix(np.ones((12, 1), np.float32)))
    assert np.isnan(pair.host(logits)).all()
    assert np.isnan(pair.gpu.download(pair.gpu.weigh_experts(logits, rows, router))).all()


def test_copies_leave_bits_unchanged(device):
    """Padded products copy floats as two-byte halves, which may look like NaN."""
    x = np.random.default_rng(0).normal(size=(9, 700)).astype(np.float32)
    x.view(np.uint16)[:, ::2] |= 0x7F81
    pair = Pair(device, "float32")
    np.testing.assert_array_equal(pair.host(pair.gpu._products._padded(pair.gpu.upload(x)))[:9], x)


@pytest.mark.parametrize("biased", [False, True])
def test_expert_mlp_equals_the_cpu(pair, biased):
    x, on_gpu = pair.values(17, 24)
    experts, gpu_experts = [], []
    for number in range(4):
        matrices = [narrow(pair.values(*shape, seed=number * 9 + shape[0])[0]) for shape in ((32, 24), (24, 16))]
        biases = [narrow(pair.values(size, seed=number)[0]) for size in (32, 24)] if biased else []
        for backend, made in ((pair.cpu, experts), (pair.gpu, gpu_experts)):
            made.append(Expert(*map(backend.matrix, matrices), *map(backend.tensor, biases)))
    counts = np.array([5, 0, 11, 1])
    expected = pair.cpu.expert_mlp(x, experts, counts)
    pair.close(pair.gpu.expert_mlp(on_gpu, gpu_experts, counts), expected, units=3)


def few_experts(pair, width, hidden, number, *, clamp=None, biased=True):
    """Experts for both backends whose matrices kernels/few_rows.cu takes."""
    experts, gpu_experts = [], []
    for seed in range(number):
        shapes = ((2 * hidden, width), (width, hidden))
        matrices = [narrow(pair.values(*shape, seed=seed * 9 + shape[0], scale=0.2)[0]) for shape in shapes]
        biases = [narrow(pair.values(size, seed=seed)[0]) for size in (2 * hidden, width)] if biased else [None, None]
        for backend, made in ((pair.cpu, experts), (pair.gpu, gpu_experts)):
            held = [None if bias is None else backend.tensor(bias) for bias in biases]
            made.append(Expert(*map(backend.matrix, matrices), *held, clamp))
    return experts, gpu_experts


@pytest.mark.parametrize(("blocks", "experts_at_once"), [(1, 32), (7, 2), (132, 32)])
@pytest.mark.parametrize(("width", "hidden"), [(192, 64), (64, 320), (320, 128)])
def test_experts_of_few_rows_equal_the_cpu(device, monkeypatch, width, hidden, blocks, experts_at_once):
    monkeypatch.setattr(few_rows, "BLOCKS", blocks)
    monkeypatch.setattr(few_rows, "MOST_EXPERTS", experts_at_once)
    pair = Pair(device, "bfloat16")
    experts, gpu_experts = few_experts(pair, width, hidden, 6, biased=blocks > 1)
    counts = np.array([5, 0, 64, 16, 65, 1])
    x, on_gpu = pair.values(int(counts.sum()), width)
    outputs = pair.gpu.expert_mlp(on_gpu, gpu_experts, counts)
    expected = pair.cpu.expert_mlp(x, experts, counts)
    pair.close(outputs, expected, units=5)  # the hidden rows are rounded before they add up
    last = pair.gpu.expert_mlp(on_gpu[-1:], gpu_experts, np.array([0, 0, 0, 0, 0, 1]))
    np.testing.assert_array_equal(pair.host(last)[0], pair.host(outputs)[-1])  # whatever the number of rows and experts


@pytest.mark.parametrize("counts", [[1], [1, 1, 1]])
def test_experts_and_counts_of_other_lengths_are_refused(pair, counts):
    x, on_gpu = pair.values(3, 128)
    experts, gpu_experts = few_experts(pair, 128, 64, 2)
    for backend, rows, given in ((pair.cpu, x, experts), (pair.gpu, on_gpu, gpu_experts)):
        with pytest.raises(ValueError, match="zip"):
            backend.expert_mlp(rows, given, np.array(counts))


def test_experts_of_few_rows_keep_to_their_memory(device, monkeypatch):
    pair = Pair(device, "bfloat16")
    _, experts = few_experts(pair, 128, 64, 5)
    counts = np.array([17, 3, 40, 1, 20])
    _, on_gpu = pair.values(int(counts.sum()), 128)
    together = pair.host(pair.gpu.expert_mlp(on_gpu, experts, counts))
    monkeypatch.setattr(few_rows, "PARTIAL_BYTES", 1)
    launches = []
    launch = few_rows.FewRows._launch
    monkeypatch.setattr(few_rows.FewRows, "_launch", lambda *given: (launches.append(given), launch(*given)))
    np.testing.assert_array_equal(pair.host(pair.gpu.expert_mlp(on_gpu, experts, counts)), together)
    assert len(launches) == 2 * len(experts)


def test_experts_of_few_rows_need_warpgroups(device, monkeypatch):
    monkeypatch.setattr(device, "has_warpgroups", False)
    pair = Pair(device, "bfloat16")
    experts, gpu_experts = few_experts(pair, 128, 64, 1)
    x, on_gpu = pair.values(3, 128)
    monkeypatch.setattr(few_rows.FewRows, "_launch", None)
    pair.close(pair.gpu.expert_mlp(on_gpu, gpu_experts, np.array([3])), pair.cpu.expert_mlp(x, experts, np.array([3])))


@pytest.mark.parametrize("clamp", [None, Clamp(alpha=1.702, limit=1.5)])
@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_an_expert_of_few_rows_clamps_as_the_cpu(device, monkeypatch, rows, clamp):
    if device.has_warpgroups:
        monkeypatch.setattr(ExpertMlps, "_of_many", None)
    pair = Pair(device, "bfloat16")
    experts, gpu_experts = few_experts(pair, 128, 64, 1, clamp=clamp)
    x, on_gpu = pair.values(rows, 128)
    outputs = pair.gpu.expert_mlp(on_gpu, gpu_experts, np.array([rows]))
    pair.close(outputs, pair.cpu.expert_mlp(x, experts, np.array([rows])), units=3)


def test_reproducible_experts_take_their_rows_in_launches_of_few(device, monkeypatch):
    if device.has_warpgroups:
        monkeypatch.setattr(ExpertMlps, "_of_many", None)
    pair = Pair(device, "bfloat16", reproducible=True)
    experts, gpu_experts = few_experts(pair, 128, 64, 2)
    x, on_gpu = pair.values(150, 128)
    outputs = pair.gpu.expert_mlp(on_gpu, gpu_experts, np.array([3, 147]))
    pair.close(outputs, pair.cpu.expert_mlp(x, experts, np.array([3, 147])), units=3)
    fewer = pair.gpu.expert_mlp(on_gpu[50:], gpu_experts, np.array([0, 100]))
    np.testing.assert_array_equal(pair.host(fewer), pair.host(outputs)[50:])


@pytest.mark.parametrize("rows", [5, 150])
def test_experts_write_the_same_bits_where_they_are_sent(pair, rows):
    _, experts = few_experts(pair, 128, 64, 2)
    counts, on_gpu = np.array([2, rows - 2]), pair.values(rows, 128)[1]
    buffer = pair.gpu.rows_in(pair.gpu.row_buffer(rows, 128))
    assert pair.gpu.expert_mlp(on_gpu, experts, counts, out=buffer) is buffer
    assert_same_bits(pair, buffer, pair.gpu.expert_mlp(on_gpu, experts, counts))
    assert pair.gpu.rows_in(np.zeros((rows, 128), pair.gpu.row_dtype)) is None


@pytest.mark.parametrize("vocabulary", [3, 5000])
def test_sample_and_score_equal_the_cpu(pair, vocabulary):
    logits = np.random.default_rng(1).normal(size=(9, vocabulary)).astype(np.float32) * 3
    logits[2, 1] = logits[2, 2] = 20  # a tie
    logits[5], logits[6, 0], logits[7, 1], logits[8] = np.nan, np.nan, np.inf, -np.inf
    on_gpu, targets = pair.gpu.upload(logits), np.array([1, 0, 2, 2, 1, 0, 1, 1, 2])
    settings = [
        {},
        {"temperature": 0.8, "top_p": 0.9},
        {},
        {"repetition_penalty": 1.5},
        {"temperature": 2.0},
        *[{}] * 4,
    ]
    requests = requests_of([row_of(uniform=0.4, seen=[0, 2], **kind) for kind in settings])
    with np.errstate(all="ignore"):
        expected, sampled = pair.cpu.sample(logits, requests, top=2), pair.gpu.sample(on_gpu, requests, top=2)
        found, scored = pair.gpu.score(on_gpu, targets, top=0), pair.cpu.score(logits, targets, top=0)
    np.testing.assert_array_equal(sampled.tokens, expected.tokens)
    np.testing.assert_array_equal(sampled.top_tokens, expected.top_tokens)
    np.testing.assert_allclose(sampled.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sampled.top_logprobs, expected.top_logprobs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.logprobs, scored.logprobs, rtol=1e-5, atol=1e-5)
    assert np.isnan(sampled.logprobs[5:]).all()


@pytest.mark.parametrize("width", [3, SUM_TOKENS, SUM_TOKENS + 5])
def test_a_scan_of_logits_equals_the_cpu(pair, width):
    logits = np.random.default_rng(1).normal(size=(9, width)).astype(np.float32) * 3
    logits[2, :2] = 20  # a tie
    logits[3, :3] = -np.inf
    logits[4, 0] = np.inf
    logits[5:, 0] = np.nan
    logits[6, :-1], logits[7], logits[8, 1:] = np.nan, np.nan, -np.inf
    targets, first = np.array([100, 101, 102, 7, 100, 100, 101, 102, 101]), 100
    expected = pair.cpu.scan(logits, targets, first=first, top=3)
    found = pair.gpu.scan(pair.gpu.upload(logits), targets, first=first, top=3)
    np.testing.assert_array_equal(found.highest[:5], expected.highest[:5])
    np.testing.assert_allclose(found.sums, expected.sums, rtol=1e-5)
    for name in ("target_logits", "top_tokens", "top_logits"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("width", [3, 1024, 5000])
def test_the_tokens_above_a_limit_are_those_of_the_cpu_and_nothing_else_is_downloaded(pair, width, monkeypatch):
    logits = np.random.default_rng(1).normal(size=(7, width)).astype(np.float32)
    least = np.array([0.5, np.inf, np.nan, -np.inf, 2.0, -0.5, 0.0], np.float32)
    logits[4, ::2], logits[5, 1:], logits[6, :2] = np.inf, np.nan, -np.inf
    on_gpu, downloads = pair.gpu.upload(logits), []
    start_download = pair.gpu.device.start_download

    def count(values):
        downloads.append(values.nbytes)
        return start_download(values)

    monkeypatch.setattr(pair.gpu.device, "start_download", count)
    found, expected = pair.gpu.tokens_above(on_gpu, least), pair.cpu.tokens_above(logits, least)
    for values, of_cpu in zip(found, expected, strict=True):
        np.testing.assert_array_equal(values, of_cpu)
    assert sum(downloads) == 4 * len(logits) + 8 * len(found[0])
    downloads.clear()
    assert [len(values) for values in pair.gpu.tokens_above(on_gpu, np.full(7, np.inf, np.float32))] == [0, 0, 0]
    assert sum(downloads) == 4 * len(logits)


def test_outputs_of_a_matrix_are_its_products(pair):
    gpu_x, whole = pair.values(3, 24)[1], pair.gpu.matrix(narrow(pair.values(50, 24, seed=1)[0]))
    found = pair.host(pair.gpu.logits(gpu_x, pair.gpu.take_outputs(whole, range(16, 48))))
    np.testing.assert_allclose(found, pair.host(pair.gpu.logits(gpu_x, whole))[:, 16:48], rtol=1e-6, atol=1e-6)


# States

RULE = DeltaRule(num_key_heads=2, num_value_heads=6, key_dim=5, value_dim=7, taps=4)


def delta_layer(pair, backend, number, rows, segments, state):
    """The convolution, the rule and the gated norm of rows [first, last); `number` chooses the backend's arrays."""

    def given(*shape, seed, dtype=None):
        both = pair.values(*shape, seed=seed)
        held = both[number] if dtype is None or number == 0 else backend.upload(both[0])
        return held[rows] if shape[0] == 40 else held

    mixed = backend.causal_conv(given(40, RULE.mixed_dim, seed=1), given(4, RULE.mixed_dim, seed=2), state, segments)
    count, keys = len(mixed), RULE.num_key_heads * RULE.key_dim
    parts = (mixed[:, :keys], mixed[:, keys : 2 * keys], mixed[:, 2 * keys :])
    heads = [part.reshape(count, -1, dim) for part, dim in zip(parts, (5, 5, 7), strict=True)]
    wide = [given(6, seed=seed, dtype=np.float32) for seed in (3, 4)]
    read = backend.delta_rule(heads, given(40, 12, seed=5), DeltaRates(*wide), state, segments)
    gate = given(40, 6, 7, seed=6)
    return read, backend.gated_norm(read, gate, RmsNorm(given(7, seed=7, dtype=np.float32), 1e-5))


def steps(backend, rule):
    """40 rows of three sequences, one of which goes on from an earlier step."""
    state = backend.layer_state(4, rule)
    first = (Segment(0, 9, 0, NO_PAGES, 3), Segment(9, 1, 0, NO_PAGES, 1))
    second = (Segment(0, 20, 9, NO_PAGES, 3), Segment(20, 10, 0, NO_PAGES, 0))
    return state, ((slice(0, 10), first), (slice(10, 40), second))


NO_PAGES = np.zeros(0, np.int64)
SPACE = StateSpace(num_heads=6, head_dim=7, num_groups=2, state_dim=5, taps=4, least_step=0.3)


def state_space_layer(pair, backend, number, rows, segments, state):
    """The convolution and the state spaces of rows [first, last); `number` chooses the backend's arrays."""

    def given(*shape, seed, dtype=None):
        both = pair.values(*shape, seed=seed)
        held = both[number] if dtype is None or number == 0 else backend.upload(both[0])
        return held[rows] if shape[0] == 40 else held

    x, taps, bias = given(40, 62, seed=1), given(4, 62, seed=2), given(62, seed=3)
    mixed = backend.causal_conv(x, taps, state, segments, bias)
    parts, shapes = (mixed[:, 52:], mixed[:, 42:52], mixed[:, :42]), ((2, 5), (2, 5), (6, 7))
    heads = [part.reshape(len(mixed), *shape) for part, shape in zip(parts, shapes, strict=True)]
    wide = StateConstants(*(given(6, seed=seed, dtype=np.float32) for seed in (4, 5, 6)))
    return (backend.state_space(heads, given(40, 6, seed=7), wide, state, segments, least_step=0.3),)


LAYERS = pytest.mark.parametrize(("layer", "rule"), [(delta_layer, RULE), (state_space_layer, SPACE)])


@LAYERS
def test_the_delta_rule_and_state_spaces_equal_the_cpu(pair, layer, rule):
    (gpu_state, parts), (cpu_state, _) = steps(pair.gpu, rule), steps(pair.cpu, rule)
    for rows, segments in parts:
        actual = layer(pair, pair.gpu, 1, rows, segments, gpu_state)
        expected = layer(pair, pair.cpu, 0, rows, segments, cpu_state)
        for one, other in zip(actual, expected, strict=True):
            pair.close(one, other, units=8)
    for slot in (0, 1, 3):
        tolerance = {"rtol": 2.0**-6 if pair.is_bfloat16 else 1e-4, "atol": 1e-2 if pair.is_bfloat16 else 1e-5}
        np.testing.assert_allclose(pair.gpu.download(gpu_state.memory)[slot], cpu_state.memory[slot], **tolerance)


@LAYERS
@pytest.mark.parametrize("cut", [1, 2, 7, 25])
def test_a_sequence_has_the_same_bits_in_other_steps(pair, layer, rule, cut):
    whole, divided = pair.gpu.layer_state(1, rule), pair.gpu.layer_state(2, rule)
    expected = layer(pair, pair.gpu, 1, slice(0, 40), (Segment(0, 40, 0, NO_PAGES, 0),), whole)
    parts = [
        layer(pair, pair.gpu, 1, rows, (Segment(0, rows.stop - rows.start, rows.start, NO_PAGES, 1),), divided)
        for rows in (slice(0, cut), slice(cut, 40))
    ]
    for whole_rows, *of_parts in zip(expected, *parts, strict=True):
        found = np.concatenate([pair.gpu.download(part) for part in of_parts])
        np.testing.assert_array_equal(found, pair.gpu.download(whole_rows))


@pytest.mark.parametrize("shape", [(3, 7), (5, 4096)])
def test_what_is_positive_is_squared(pair, shape):
    x, gpu_x = pair.values(*shape)
    pair.close(pair.gpu.squared_relu(gpu_x), pair.cpu.squared_relu(x))


@pytest.mark.parametrize("width", [1, 7, 40])
def test_each_number_has_a_gate_of_its_own(pair, width):
    (x, gpu_x), (logits, gpu_logits) = pair.values(9, width), pair.values(9, width, seed=1, scale=4)
    pair.close(pair.gpu.scale_by_sigmoid(gpu_x, gpu_logits), pair.cpu.scale_by_sigmoid(x, logits))


@pytest.mark.parametrize("width", [8, 33, 3000])
def test_weights_of_norms_may_be_float32(pair, width):
    (x, gpu_x), (y, gpu_y) = pair.values(5, width), pair.values(5, width, seed=1)
    weight = np.random.default_rng(2).normal(size=width).astype(np.float32)
    gpu_weight = pair.gpu.upload(weight)
    expected = pair.cpu.add_rms_norm(x, y, weight, eps=1e-5, rounded=False)
    actual = pair.gpu.add_rms_norm(gpu_x, gpu_y, gpu_weight, eps=1e-5, rounded=False)
    for one, other in zip(actual, expected, strict=True):
        pair.close(one, other, units=2)
    found = pair.gpu.rms_norm(gpu_x, gpu_weight, eps=1e-5, rounded=False)
    pair.close(found, pair.cpu.rms_norm(x, weight, eps=1e-5, rounded=False), units=2)
    weights, rows = (np.full((5, 1), 0.5, np.float32), np.arange(5)[:, None])
    choices, norm = (pair.gpu.upload(rows), pair.gpu.upload(weights)), RmsNorm(gpu_weight, 1e-5, rounded=False)
    combined, normalized = pair.gpu.combine_rms_norm(gpu_x, *choices, [gpu_y], norm)
    assert_same_bits(pair, normalized, pair.gpu.rms_norm(combined, gpu_weight, eps=1e-5, rounded=False))
