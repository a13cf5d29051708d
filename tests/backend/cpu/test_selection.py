"""The positions that an indexer chooses, and attention over them, against their definitions."""

import numpy as np
import pytest

from backend.cpu.test_backend import BACKENDS, KERNELS, values
from backend.cpu.test_compiled import RUNNABLE
from moempi.backend.cpu import compiled, kernels
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import load_kernels
from moempi.backend.cpu.selection import best_positions
from moempi.backend.values import Segment

PAGES = np.array([4, 1, 2])
LENGTH = 150


def twin_positions(queries, weights, keys, *, top_k, first):
    """In float64, a position at a time; Python's sort keeps the order of equal scores."""
    chosen = []
    for position in range(first, len(keys)):
        scores = np.maximum(queries[position].astype(np.float64) @ keys[: position + 1].T, 0)
        scores = weights[position] @ scores
        best = sorted(range(position + 1), key=lambda at: -scores[at])[:top_k]
        chosen.append(sorted(best))
    return np.array(chosen)


def whole_numbers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-2, 3, size=shape).astype(np.float32)


def filled(backend, keys, *, latent):
    cache = backend.cache(6, 1, keys.shape[-1], latent=latent)
    backend.extend_cache(cache, keys[:, None, :], None, [Segment(0, len(keys), 0, PAGES)])
    return cache


@BACKENDS
@pytest.mark.parametrize(("heads", "dim", "top_k"), [(4, 16, 16), (6, 20, 33), (1, 7, 1), (9, 64, 100)])
def test_equal_scores_choose_the_lowest_positions(backend, heads, dim, top_k):
    queries, keys = whole_numbers(LENGTH, heads, dim), whole_numbers(LENGTH, dim, seed=1)
    weights = whole_numbers(LENGTH, heads, seed=2)
    index = filled(backend, keys, latent=dim)
    segment = Segment(0, LENGTH - top_k, top_k, PAGES)
    chosen = backend.select_positions(queries[top_k:], weights[top_k:], index, [segment], top_k=top_k)
    expected = twin_positions(queries, weights, keys, top_k=top_k, first=top_k)
    np.testing.assert_array_equal(backend.download(chosen), expected)


@BACKENDS
def test_chosen_positions_and_attention_do_not_depend_on_the_chunks(backend):
    queries, keys, weights, first = values(LENGTH, 5, 24), values(LENGTH, 24, seed=1), values(LENGTH, 5, seed=2), 20
    index, cache, results = filled(backend, keys, latent=24), filled(backend, keys, latent=16), set()
    for chunks in ((130,), (1,) * 130, (7,) * 18 + (4,), (64, 66)):
        start, parts = first, []
        for count in chunks:
            rows, segments = slice(start, start + count), [Segment(0, count, start, PAGES)]
            chosen = backend.select_positions(queries[rows], weights[rows], index, segments, top_k=first)
            parts += [chosen, backend.attend_selected(queries[rows], cache, segments, chosen, scale=0.2)]
            start += count
        results.add((np.concatenate(parts[::2]).tobytes(), np.concatenate(parts[1::2]).tobytes()))
    assert len(results) == 1


@BACKENDS
def test_attention_over_all_positions_is_attention(backend):
    queries, keys = values(LENGTH, 5, 24), values(LENGTH, 24, seed=1)
    cache, segments = filled(backend, keys, latent=16), [Segment(0, 1, LENGTH - 1, PAGES)]
    everything = np.arange(LENGTH, dtype=np.int32)[None]
    actual = backend.attend_selected(queries[-1:], cache, segments, everything, scale=0.2)
    expected = backend.attend(queries[-1:], cache, segments, scale=0.2)
    np.testing.assert_allclose(actual, expected, atol=4e-3 if backend.is_bfloat16 else 1e-6)


@BACKENDS
def test_positions_that_are_not_chosen_change_nothing(backend):
    queries, keys = values(LENGTH, 5, 24), values(LENGTH, 24, seed=1)
    chosen, segments = np.array([[3, 64, 70, 149]], np.int32), [Segment(0, 1, LENGTH - 1, PAGES)]
    other = np.full_like(keys, np.nan)
    other[chosen[0]] = keys[chosen[0]]
    attended = [
        backend.attend_selected(queries[-1:], filled(backend, held, latent=16), segments, chosen, scale=0.2)
        for held in (keys, other)
    ]
    np.testing.assert_array_equal(attended[0], attended[1])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1, 2, 3, 4], [2, 3]),
        ([5, 5, 5, 5], [0, 1]),
        ([0.0, -0.0, -1, 0.0], [0, 1]),
        ([1, np.nan, 3, np.nan], [1, 3]),
        ([np.nan, np.inf, np.nan, np.inf], [0, 1]),
        ([-np.inf, -np.inf, -np.inf, 0], [0, 3]),
    ],
)
def test_the_best_positions(scores, expected):
    assert best_positions(np.array(scores, np.float32), 2).tolist() == expected


@pytest.mark.skipif(KERNELS is None, reason="no C compiler, or a processor without kernels")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_selections_have_the_same_bits_for_any_threads_instructions_and_pieces(monkeypatch, precision):
    queries, keys, weights = values(LENGTH, 5, 24), values(LENGTH, 24, seed=1), values(LENGTH, 5, seed=2)
    results = set()
    for name in RUNNABLE:
        for threads, piece in ((1, 1e8), (2, 1e8), (3, 1.0)):
            monkeypatch.setattr(kernels, "PIECE_FLOPS", piece)
            monkeypatch.setattr(compiled, "COPY_BYTES", int(piece))
            backend = CompiledBackend(load_kernels(name), precision=precision, threads=threads)
            index, cache = filled(backend, keys, latent=24), filled(backend, keys, latent=16)
            segments = [Segment(0, LENGTH - 20, 20, PAGES)]
            chosen = backend.select_positions(queries[20:], weights[20:], index, segments, top_k=20)
            attended = backend.attend_selected(queries[20:], cache, segments, chosen, scale=0.2)
            results.add((chosen.tobytes(), attended.tobytes()))
    assert len(results) == 1
