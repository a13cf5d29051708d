"""The compiled kernels beside their twins in NumPy, and their bits: for any batch, threads and instructions."""

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import MatrixProduct, instructions, load_kernels
from moempi.backend.values import Expert, RmsNorm, Segment
from moempi.config.architecture import Clamp, Router
from moempi.config.tensors import PAGE_ROWS

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or a processor without kernels")
PRECISIONS = pytest.mark.parametrize("precision", ["float32", "bfloat16"])
RUNNABLE = instructions()


def numbers(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


def pair(precision, threads=1):
    return NumpyBackend(precision=precision), CompiledBackend(load_kernels(), precision=precision, threads=threads)


def assert_near(found, expected, precision):
    """Within rounding: a sum in another order may round to the next bfloat16 value."""
    largest = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, atol=largest * (2.0**-7 if precision == "bfloat16" else 2e-6))
    assert precision == "float32" or np.sum(found != expected) <= 1 + 0.05 * expected.size


SHAPES = [(1, 1), (7, 33), (64, 64), (100, 257), (1600, 48), (3000, 31)]


@PRECISIONS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6, 7, 12, 13, 97, 200])
def test_a_product_equals_its_twin(precision, shape, rows):
    inputs, outputs = shape
    twin, compiled = pair(precision)
    x, stored, bias = numbers(rows, inputs), narrow(numbers(outputs, inputs, seed=1)), numbers(outputs, seed=2)
    parts = [stored[: outputs // 3], stored[outputs // 3 :]]
    for given in (None, bias):
        expected = twin.linear(x, twin.matrix(*parts), given)
        found = compiled.linear(x, compiled.matrix(*parts), given)
        assert_near(found, expected, precision)
        transposed = compiled.matrix(*(part.T for part in parts), transposed=True)
        np.testing.assert_array_equal(compiled.linear(x, transposed, given), found)
        np.testing.assert_array_equal(compiled.linear(x, compiled.matrix(twin.tensor(stored)), given), found)
    logits = compiled.logits(x, compiled.matrix(*parts), bias)
    np.testing.assert_allclose(logits, twin.logits(x, twin.matrix(*parts), bias), atol=1e-5 * max(1, inputs) ** 0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_in_every_batch_with_any_threads_and_instructions(shape):
    inputs, outputs = shape
    stored, x = narrow(numbers(outputs, inputs, seed=1)), numbers(203, inputs)
    bits = {}
    for name in RUNNABLE:
        for threads in (1, 3):
            found = load_kernels(name)
            found.use_threads(threads)
            matrix = found.pack([stored], transposed=False)
            for batch in (1, 2, 3, 5, 6, 7, 11, 12, 13, 64, 203):
                rows = np.empty((len(x), outputs), np.float32)
                for first in range(0, len(x), batch):
                    part = slice(first, first + batch)
                    found.multiply(
                        x[part], [MatrixProduct(matrix, len(x[part]))], rows[part], narrow=False, rounded=False
                    )
                bits[name, threads, batch] = rows.tobytes()
    assert len(set(bits.values())) == 1


@PRECISIONS
def test_rows_and_results_may_be_apart(precision):
    twin, compiled = pair(precision)
    wide, stored = numbers(9, 200), narrow(numbers(40, 64, seed=1))
    assert_near(
        compiled.linear(wide[:, 50:114], compiled.matrix(stored)),
        twin.linear(wide[:, 50:114], twin.matrix(stored)),
        precision,
    )
    heads, matrices = numbers(9, 4, 24), numbers(4, 16, 20, seed=2)
    for part in (heads[..., :16], np.ascontiguousarray(heads[..., :16])):
        assert_near(
            compiled.linear_heads(part, compiled.head_matrices(narrow(matrices))),
            twin.linear_heads(part, twin.head_matrices(narrow(matrices))),
            precision,
        )


@PRECISIONS
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("counts", [(0, 0, 0), (1, 0, 1), (3, 40, 0), (0, 0, 130)])
@pytest.mark.parametrize("clamp", [None, Clamp(alpha=1.702, limit=2.0)])
def test_experts_equal_their_twins(precision, threads, counts, clamp):
    backends = pair(precision, threads)
    x, results = numbers(sum(counts), 72), []
    for backend in backends:
        experts = [
            Expert(
                backend.matrix(narrow(numbers(2 * 56, 72, seed=3 * e))),
                backend.matrix(narrow(numbers(72, 56, seed=3 * e + 1))),
                backend.tensor(narrow(numbers(112, seed=9))) if clamp else None,
                backend.tensor(narrow(numbers(72, seed=8))) if clamp else None,
                clamp,
            )
            for e in range(3)
        ]
        results.append(backend.expert_mlp(x, experts, np.array(counts)))
        out = np.full_like(x, np.nan)
        assert backend.expert_mlp(x, experts, np.array(counts), out=out) is out
        np.testing.assert_array_equal(out, results[-1])
    largest = max(1.0, float(np.abs(results[0]).max(initial=0)))
    np.testing.assert_allclose(results[1], results[0], atol=largest * (2e-2 if precision == "bfloat16" else 5e-6))


@PRECISIONS
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("shape", [(0, 16), (1, 5), (4, 64), (7, 100), (3, 4, 24)])
def test_norms_equal_their_twins(precision, rounded, shape):
    twin, compiled = pair(precision)
    x, y, weight = numbers(*shape), numbers(*shape, seed=1), numbers(shape[-1], seed=2)
    options = {"eps": 1e-6, "rounded": rounded}
    assert_near(compiled.rms_norm(x, weight, **options), twin.rms_norm(x, weight, **options), precision)
    if len(shape) == 2:
        total, normalized = compiled.add_rms_norm(x, y, weight, **options)
        np.testing.assert_array_equal(total, twin.add(x, y))
        np.testing.assert_array_equal(normalized, compiled.rms_norm(total, weight, **options))


@PRECISIONS
@pytest.mark.parametrize("clamp", [None, Clamp(alpha=1.702, limit=1.0)])
def test_activations_equal_their_twins(precision, clamp):
    twin, compiled = pair(precision)
    x = numbers(5, 2 * 37) * 30
    x[0, :4] = 0.0, -0.0, 200.0, -200.0
    assert_near(compiled.swiglu(x, clamp), twin.swiglu(x, clamp), precision)


def step(kv_heads, dim, value_dim, latent, precision, *, lengths, starts, seed=0):
    """Both backends' caches filled up to `starts`, and segments of new rows on pages in another order."""
    pages = [-(-(start + length) // PAGE_ROWS) for start, length in zip(starts, lengths, strict=True)]
    order = np.random.default_rng(seed).permutation(sum(pages))
    split = np.split(order, np.cumsum(pages)[:-1])
    rows = np.cumsum([0, *lengths])[:-1].tolist()
    segments = [Segment(*s) for s in zip(rows, lengths, starts, split, strict=True)]
    caches = []
    for backend in pair(precision):
        cache = backend.cache(sum(pages), kv_heads, dim, latent=latent)
        kept = numbers(len(order) * PAGE_ROWS, kv_heads, dim, seed=5)
        cache.keys[:] = kept if cache.keys.dtype == np.float32 else narrow(kept)
        if not latent:
            values = numbers(*kept.shape, seed=6)
            cache.values[:] = values if cache.values.dtype == np.float32 else narrow(values)
        caches.append((backend, cache))
    return segments, caches


CASES = [
    {"lengths": (1, 1, 1), "starts": (0, 63, 200)},
    {"lengths": (5, 1, 70), "starts": (60, 300, 130)},
    {"lengths": (300,), "starts": (0,)},
]


@PRECISIONS
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("window", [0, 40, 128])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "latent"), [(4, 4, 32, 0), (8, 2, 24, 0), (6, 1, 80, 64), (7, 1, 128, 0)]
)
def test_attention_equals_its_twin(precision, case, window, heads, kv_heads, dim, latent):
    segments, caches = step(kv_heads, dim, dim, latent, precision, **case)
    queries = numbers(sum(case["lengths"]), heads, dim, seed=7)
    for sinks in (None, numbers(heads, seed=8)):
        options = {"scale": dim**-0.5, "window": window, "sinks": sinks}
        expected, found = (backend.attend(queries, cache, segments, **options) for backend, cache in caches)
        assert_near(found, expected, precision)


@PRECISIONS
@pytest.mark.parametrize("window", [0, 100])
def test_attention_has_the_same_bits_for_any_chunks_threads_and_instructions(precision, window):
    length, heads = 300, 4
    segments, caches = step(2, 64, 64, 0, precision, lengths=(length,), starts=(0,))
    cache, queries = caches[1][1], numbers(length, heads, 64, seed=7)
    bits = set()
    for name in RUNNABLE:
        for threads, chunk in ((1, 300), (2, 300), (1, 1), (1, 7), (3, 65)):
            backend = CompiledBackend(load_kernels(name), precision=precision, threads=threads)
            parts = []
            for first in range(0, length, chunk):
                rows = min(chunk, length - first)
                part = [Segment(0, rows, first, segments[0].pages)]
                parts.append(backend.attend(queries[first : first + rows], cache, part, scale=0.125, window=window))
            bits.add(np.concatenate(parts).tobytes())
    assert len(bits) == 1


@PRECISIONS
@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("unusual", [np.nan, np.inf, -np.inf])
def test_attention_is_no_number_from_an_unusual_key_on(precision, chunk, unusual):
    length, broken = 100, 70
    segments, caches = step(1, 32, 32, 0, precision, lengths=(length,), starts=(0,))
    (backend, cache), queries = caches[1], numbers(length, 2, 32, seed=7)
    row = int(segments[0].pages[broken // PAGE_ROWS]) * PAGE_ROWS + broken % PAGE_ROWS
    cache.keys[row] = unusual if precision == "float32" else narrow(np.full((1, 32), unusual, np.float32))
    attended = np.concatenate(
        [
            backend.attend(queries[at : at + chunk], cache, [Segment(0, chunk, at, segments[0].pages)], scale=0.125)
            for at in range(0, length, chunk)
        ]
    )
    assert np.isfinite(attended[:broken]).all()
    assert np.isnan(attended[broken:]).all()


@pytest.mark.parametrize("amplitude", [1.0, 1.25])
@pytest.mark.parametrize("theta", [1e4, 5e6])
def test_angles_are_the_float32_numbers_nearest_to_the_exact_ones(theta, amplitude):
    positions = np.concatenate([np.arange(3000), np.random.default_rng(0).integers(0, 2_000_000, 1000)])
    frequencies = (theta ** -np.linspace(0, 1, 64)).astype(np.float32)
    found = [
        backend.rope_angles(positions, frequencies=frequencies, amplitude=amplitude) for backend in pair("float32")
    ]
    for exact, numbers in zip(*found, strict=True):
        np.testing.assert_allclose(numbers, exact, rtol=2.0**-22, atol=2.0**-24)
        assert np.count_nonzero(numbers != exact) < 5


@PRECISIONS
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("pairs", [4, 12])
def test_rotations_into_a_cache_equal_their_twins(precision, interleaved, with_norms, pairs):
    segments, caches = step(2, 24, 24, 0, precision, lengths=(5, 1, 70), starts=(60, 300, 130))
    rows = 76
    qkv = numbers(rows, (4 + 2 + 2) * 24, seed=3)
    heads = tuple(part.reshape(rows, -1, 24) for part in (qkv[:, :96], qkv[:, 96:144], qkv[:, 144:]))
    results = []
    for backend, cache in caches:
        angles = backend.rope_angles(
            np.arange(rows), frequencies=np.linspace(1, 0.01, pairs, dtype=np.float32), amplitude=1.1
        )
        norms = tuple(RmsNorm(numbers(24, seed=s), 1e-6) for s in (1, 2)) if with_norms else None
        queries = backend.rotate_into_cache(
            heads, angles, cache=cache, segments=segments, interleaved=interleaved, norms=norms
        )
        widened = [
            held if held.dtype == np.float32 else (held.astype(np.uint32) << 16).view(np.float32)
            for held in (cache.keys, cache.values)
        ]
        results.append((queries, *widened))
    for expected, found in zip(*results, strict=True):
        assert_near(found, expected, precision)
        if not with_norms:
            np.testing.assert_array_equal(found, expected)


def test_the_exponential_is_accurate_and_keeps_nan():
    _, compiled = pair("float32")
    gates = np.linspace(-87, 87, 20000, dtype=np.float32)
    found = compiled.swiglu(np.concatenate([gates[None], np.ones((1, len(gates)), np.float32)], axis=1))[0]
    exact = gates.astype(np.float64) / (1 + np.exp(-gates.astype(np.float64)))
    np.testing.assert_allclose(found, exact, rtol=6e-7)
    assert np.isnan(compiled.swiglu(np.array([[np.nan, 1.0]], np.float32))).all()


ROUTERS = [
    Router(top_k=3),
    Router(top_k=8, renormalize=True, scaling=2.5),
    Router(top_k=2, scoring="sigmoid", renormalize=True, float32_logits=True, float32_weights=True),
    Router(top_k=4, scoring="softmax_chosen"),
    Router(top_k=4, scoring="sigmoid", num_groups=4, kept_groups=2, group_score="top2", renormalize=True),
    Router(top_k=4, num_groups=4, kept_groups=1),
]


@PRECISIONS
@pytest.mark.parametrize("router", ROUTERS)
def test_experts_are_chosen_as_by_the_twin(precision, router):
    twin, compiled = pair(precision)
    correction = numbers(32, seed=1).astype(np.float32) / 4
    for given, bias in ((None, None), (correction, None), (None, correction), (correction, -2 * correction)):
        logits = numbers(200, 32, seed=3) + np.float32(1e-3)
        logits[:9] = np.round(logits[:9])  # many ties
        options = {"correction": given, "selection_bias": bias}
        expected, found = (backend.choose_experts(logits, router, **options) for backend in (twin, compiled))
        assert found[0].dtype == expected[0].dtype
        same = (found[0] == expected[0]).all(axis=1)
        assert same.mean() >= 0.99, "scores may differ in the last place, and so the order of near ones"
        tolerance = 2.0**-8 if precision == "bfloat16" and not router.float32_weights else 1e-6
        np.testing.assert_allclose(found[1][same], expected[1][same], rtol=tolerance)


def test_experts_are_distinct_whatever_the_logits():
    _, compiled = pair("float32")
    for value in (0.0, np.nan, np.inf, -np.inf):
        for router in ROUTERS:
            experts, _ = compiled.choose_experts(np.full((2, 32), value, np.float32), router)
            assert all(len(set(row)) == router.top_k for row in experts.tolist())
            assert ((experts >= 0) & (experts < 32)).all()


@PRECISIONS
@pytest.mark.parametrize("width", [1, 16, 37])
@pytest.mark.parametrize("num_addends", [0, 1, 2])
def test_rows_are_packed_unpacked_and_combined_as_by_the_twin(precision, width, num_addends):
    twin, compiled = pair(precision)
    rows, dice = numbers(9, width), np.random.default_rng(1)
    for index in (None, np.array([3, 3, 0, 8, 1, 2, 4, 5, 7], np.int32), np.array([], np.int64)):
        count = 9 if index is None else len(index)
        buffers = [backend.comm_buffer(count, width) for backend in (twin, compiled)]
        for backend, buffer in zip((twin, compiled), buffers, strict=True):
            backend.pack(rows, index, buffer)
        np.testing.assert_array_equal(*buffers)
        if index is None:
            for chosen in (None, np.array([1, 1, 8])):
                np.testing.assert_array_equal(twin.unpack(buffers[0], chosen), compiled.unpack(buffers[0], chosen))
            output_rows, weights = dice.integers(0, 9, (5, 3)), numbers(5, 3, seed=4)
            addends = [numbers(5, width, seed=seed) for seed in range(num_addends)]
            results = [backend.combine(buffers[0], output_rows, weights, addends) for backend in (twin, compiled)]
            np.testing.assert_array_equal(*results)


def test_log_probabilities_equal_their_twins():
    twin, compiled = pair("float32")
    for width in (1, 15, 16, 33, 5000):
        logits = 10 * numbers(7, width)
        targets = np.arange(7) % width
        expected, found = (backend.score(logits, targets, top=min(3, width)) for backend in (twin, compiled))
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=4e-6)
        np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, atol=4e-6)
        np.testing.assert_array_equal(found.top_tokens, expected.top_tokens)
    assert not np.isfinite(compiled.score(np.full((1, 9), np.nan, np.float32), np.zeros(1, int), top=0).logprobs[0])
