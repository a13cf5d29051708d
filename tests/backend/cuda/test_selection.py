"""Sparse attention of the CUDA backend against the CPU backend; tests/gpu.sh runs the same tests on a GPU."""

from functools import partial

import numpy as np
import pytest

from backend.cuda.test_backend import Pair, cached
from moempi.arrays import narrow
from moempi.backend.cuda import selection
from moempi.backend.values import Segment

LENGTHS = [(300, 1), (70, 3), (230, 90)]


@pytest.fixture(params=("bfloat16", "float32"))
def pair(request, device):
    return Pair(device, request.param)


def whole_numbers(pair, *shape, seed=0):
    """Small integers, whose sums are exact and often equal: for the CPU, and for the GPU."""
    numbers = np.random.default_rng(seed).integers(-2, 3, size=shape).astype(np.float32)
    return numbers, pair.gpu.device.upload(narrow(numbers) if pair.is_bfloat16 else numbers)


def scored(pair, *, heads, dim, seed=0):
    """Caches of an indexer, segments of their last rows, and queries and weights of both backends."""
    caches, segments = cached(pair, heads=1, dim=dim, lengths=LENGTHS, scattered=True, latent=dim)
    everything = [Segment(0, total, 0, segment.pages) for (total, _), segment in zip(LENGTHS, segments, strict=True)]
    for number, segment in enumerate(everything):
        keys, gpu_keys = whole_numbers(pair, segment.length, 1, dim, seed=seed + number)
        pair.cpu.extend_cache(caches[0], keys, None, [segment])
        pair.gpu.extend_cache(caches[1], gpu_keys, None, [segment])
    rows = sum(new for _, new in LENGTHS)
    queries, weights = whole_numbers(pair, rows, heads, dim, seed=7), np.random.default_rng(8)
    weights = weights.integers(-3, 4, size=(rows, heads)).astype(np.float32)
    return caches, segments, queries, (weights, pair.gpu.device.upload(weights))


@pytest.mark.parametrize(("heads", "dim", "top_k"), [(4, 16, 16), (6, 20, 33), (1, 7, 1), (9, 64, 40)])
def test_chosen_positions_are_those_of_the_cpu(pair, monkeypatch, heads, dim, top_k):
    caches, segments, queries, weights = scored(pair, heads=heads, dim=dim)
    expected = pair.cpu.select_positions(queries[0], weights[0], caches[0], segments, top_k=top_k)
    for score_bytes in (selection.SCORE_BYTES, 1):
        monkeypatch.setattr(selection, "SCORE_BYTES", score_bytes)
        actual = pair.gpu.select_positions(queries[1], weights[1], caches[1], segments, top_k=top_k)
        np.testing.assert_array_equal(pair.gpu.download(actual), expected)


def test_weights_that_are_no_numbers_choose_the_lowest_positions(pair):
    caches, segments, queries, weights = scored(pair, heads=4, dim=16)
    weights[0][:20], weights[0][20:40] = np.nan, 0
    on_gpu = pair.gpu.device.upload(weights[0])
    actual = pair.gpu.select_positions(queries[1], on_gpu, caches[1], segments, top_k=10)
    expected = pair.cpu.select_positions(queries[0], weights[0], caches[0], segments, top_k=10)
    np.testing.assert_array_equal(pair.gpu.download(actual), expected)
    np.testing.assert_array_equal(expected[:40], np.tile(np.arange(10), (40, 1)))


@pytest.mark.parametrize(("heads", "dim", "latent", "top_k"), [(5, 40, 32, 20), (4, 576, 512, 64), (6, 24, 16, 39)])
def test_attention_over_chosen_positions_equals_the_cpu(pair, monkeypatch, heads, dim, latent, top_k):
    caches, segments = cached(pair, heads=1, dim=dim, lengths=LENGTHS, scattered=True, latent=latent)
    rows, random = sum(new for _, new in LENGTHS), np.random.default_rng(1)
    ends = np.concatenate([np.arange(segment.start, segment.start + segment.length) for segment in segments])
    positions = np.array([np.sort(random.permutation(end + 1)[:top_k]) for end in ends], np.int32)
    queries, gpu_queries = pair.values(rows, heads, dim, seed=3)
    expected = pair.cpu.attend_selected(queries, caches[0], segments, positions, scale=0.04)
    attend = partial(pair.gpu.attend_selected, gpu_queries, caches[1], segments, pair.gpu.upload(positions), scale=0.04)
    together = pair.host(attend())
    np.testing.assert_allclose(together, expected, atol=0.012 if pair.is_bfloat16 else 2e-6)
    monkeypatch.setattr(selection, "COPY_BYTES", 1)
    pair.gpu._selection._layouts.clear()
    np.testing.assert_array_equal(pair.host(attend()), together)
