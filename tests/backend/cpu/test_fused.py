"""Layers and their parts in one call: the bits of the separate verbs, and no byte beyond their arrays."""

import copy

import numpy as np
import pytest

from backend.cpu.guarded import guarded
from backend.cpu.tiled_kernels import tiled_kernels
from moempi.arrays import address_of, narrow, round_to_bfloat16
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import instructions, load_kernels
from moempi.backend.values import Expert, ExpertsBlock, Segment
from moempi.config.architecture import AttentionShape, Clamp, Rope, Router
from moempi.config.tensors import PAGE_ROWS
from moempi.model.attention import Attention
from moempi.model.norm import Norm

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or a processor without kernels")
STEPS = [((0,), (1,)), ((63,), (1,)), ((5, 0, 130), (1, 1, 1)), ((60, 0, 128), (9, 3, 1)), ((0,), (0,))]
"""Starts and lengths of the sequences of a step."""
SHAPES = {
    "plain": AttentionShape(2, 2, 16),
    "grouped": AttentionShape(6, 2, 24, qk_norm="head", rope=Rope(dim=10)),
    "biases and sinks": AttentionShape(4, 1, 33, biases="all", sinks=True, score_factor=0.7),
    "interleaved window": AttentionShape(3, 3, 17, rope=Rope(dim=16, interleaved=True), window=40),
}
RULES = {
    "softmax": Router(top_k=4, renormalize=True),
    "sigmoid": Router(top_k=3, scoring="sigmoid", correction=True, num_groups=4, kept_groups=2, group_score="top2"),
    "chosen": Router(top_k=2, scoring="softmax_chosen", bias=True, float32_logits=True),
    "all": Router(top_k=12, scaling=2.5, float32_weights=True),
}
WIDTH, HIDDEN, EXPERTS = 34, 21, 12
PRECISIONS = ("float32", "bfloat16")


def values(*shape, seed=0):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


EXACT = {"plain": (load_kernels(), 1), **{name: (load_kernels(name), 3) for name in instructions()}}
KINDS = {
    **{f"{name}, {precision}": (*of, precision, False) for name, of in EXACT.items() for precision in PRECISIONS},
    **{f"{name}, tiles": (of, 3, "bfloat16", True) for name, of in tiled_kernels().items()},
}
"""Kernels, their threads, the precision, and whether products use tiles."""


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def backend(request, monkeypatch):
    """A backend on kernels whose scratch memory is full of NaNs and ends at a page that cannot be accessed."""
    (kernels, threads, precision, tiled), held = request.param, []
    if kernels is None:
        pytest.skip("not to be compiled here")

    def workspace(num_bytes):
        held[:] = [guarded(np.full(num_bytes, 255, np.uint8))]
        return address_of(held[0])

    monkeypatch.setattr(kernels, "workspace", workspace)
    yield CompiledBackend(kernels, precision=precision, threads=threads, tiled=tiled)
    kernels.use_threads(1)


def stored(*shape, seed):
    return narrow(values(*shape, seed=seed) / np.float32(4))


def attention_of(backend, shape, norms_rounded, window=None):
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    rows = (heads + 2 * kv_heads) * dim
    biases = shape.biases == "all"
    return Attention(
        shape,
        1e-6,
        qkv=backend.matrix(stored(rows, WIDTH, seed=1)),
        output=backend.matrix(stored(WIDTH, heads * dim, seed=2)),
        qkv_bias=guarded(values(rows, seed=3)) if biases else None,
        output_bias=guarded(values(WIDTH, seed=4)) if biases else None,
        q_norm=guarded(values(dim, seed=5)) if shape.qk_norm == "head" else None,
        k_norm=guarded(values(dim, seed=6)) if shape.qk_norm == "head" else None,
        sinks=guarded(values(heads, seed=7)) if shape.sinks else None,
        window=shape.window if window is None else window,
        norms_rounded=norms_rounded,
    )


def segments_of(starts, lengths):
    pages = [max(1, -(-(start + length) // PAGE_ROWS)) for start, length in zip(starts, lengths, strict=True)]
    order = np.split(np.random.default_rng(1).permutation(sum(pages)), np.cumsum(pages)[:-1])
    rows = np.cumsum([0, *lengths])[:-1].tolist()
    return [Segment(*one) for one in zip(rows, lengths, starts, order, strict=True)], sum(pages)


def filled_cache(backend, shape, pages):
    cache = backend.cache(pages, shape.num_kv_heads, shape.head_dim)
    for held, seed in ((cache.keys, 10), (cache.values, 11)):
        kept = values(*held.shape, seed=seed)
        held[:] = kept if held.dtype == np.float32 else narrow(kept)
    return cache


def angles_of(backend, shape, starts, lengths):
    positions = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    frequencies = np.geomspace(1, 1e-3, (shape.rope.dim or shape.head_dim) // 2, dtype=np.float32)
    return backend.rope_angles(np.concatenate(positions), frequencies=frequencies, amplitude=1.1)


@pytest.mark.parametrize("kind", ["rms", "rms_float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_fused_attention_has_the_bits_of_its_verbs(backend, kind, shape):
    attention = attention_of(backend, shape, norms_rounded=kind == "rms")
    norms = [Norm(kind, eps, guarded(values(WIDTH, seed=seed))) for eps, seed in ((1e-6, 8), (1e-5, 9))]
    fused = backend.fuse_attention(attention.block(*norms))
    for starts, lengths in STEPS:
        segments, pages = segments_of(starts, lengths)
        cache = filled_cache(backend, shape, pages)
        other, x = copy.deepcopy(cache), guarded(values(sum(lengths), WIDTH, seed=12))
        angles = angles_of(backend, shape, starts, lengths)
        rows = attention(backend, norms[0](backend, x), angles, cache, segments)
        *results, packed = fused(x, angles, other, segments)
        assert packed is None
        for expected, found in zip(norms[1].of_sum(backend, x, rows), results, strict=True):
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
        np.testing.assert_array_equal(other.keys, cache.keys)
        np.testing.assert_array_equal(other.values, cache.values)


def experts_of(backend, *, clamp):
    return [
        Expert(
            backend.matrix(stored(2 * HIDDEN, WIDTH, seed=3 * number)),
            backend.matrix(stored(WIDTH, HIDDEN, seed=3 * number + 1)),
            guarded(values(2 * HIDDEN, seed=number)) if clamp else None,
            guarded(values(WIDTH, seed=number + 1)) if clamp else None,
            clamp,
        )
        for number in range(EXPERTS)
    ]


def experts_block(backend, rule, *, clamp):
    return ExpertsBlock(
        backend.matrix(stored(EXPERTS, WIDTH, seed=50)),
        guarded(values(EXPERTS, seed=51)) if rule.bias else None,
        rule,
        guarded(values(EXPERTS, seed=52)) if rule.correction else None,
        experts_of(backend, clamp=clamp),
    )


def sums_by_verbs(backend, block, x, addends):
    """The sums, experts, weights and numbers of choices, as an exchange between ranks computes them."""
    logits = backend.logits(x, block.router, block.router_bias)
    chosen, weights = backend.choose_experts(logits, block.rule, correction=block.correction)
    source_rows, output_rows, counts = backend.group(chosen, np.arange(EXPERTS), num_ids=EXPERTS)
    sent, returned = (backend.comm_buffer(len(source_rows), WIDTH) for _ in range(2))
    backend.pack(x, source_rows, sent)
    outputs = backend.expert_mlp(backend.unpack(sent, None), block.experts, counts)
    backend.pack(outputs, None, returned)
    return backend.combine(returned, output_rows, weights, addends), chosen, weights, counts


@pytest.mark.parametrize("clamp", [None, Clamp(alpha=1.7, limit=0.5)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_fused_experts_have_the_bits_of_their_verbs(backend, clamp, rule):
    block = experts_block(backend, rule, clamp=clamp)
    fused = backend.fuse_experts(block)
    for number, rows in enumerate((1, 2, 0, 7, 40)):
        x = guarded(values(rows, WIDTH, seed=53))
        addends = [guarded(values(rows, WIDTH, seed=54 + addend)) for addend in range(number % 3)]
        load = np.arange(EXPERTS)
        found = *fused(x, addends, load), load - np.arange(EXPERTS)
        for one, expected in zip(found, sums_by_verbs(backend, block, x, addends), strict=True):
            np.testing.assert_array_equal(one, expected)
        np.testing.assert_array_equal(found[0].view(np.uint32), fused(x, addends, load)[0].view(np.uint32))


@pytest.mark.parametrize(("shape", "rule"), list(zip(SHAPES.values(), RULES.values(), strict=True)), ids=SHAPES)
def test_fused_layers_have_the_bits_of_their_parts(backend, shape, rule):
    norm = Norm("rms", 1e-6, guarded(values(WIDTH, seed=8)))
    attentions = [attention_of(backend, shape, True, window=window) for window in (0, 70, shape.window)]
    parts = [
        (
            backend.fuse_attention(attention.block(norm, norm)),
            backend.fuse_experts(experts_block(backend, rule, clamp=Clamp(alpha=1.7, limit=0.5) if number else None)),
        )
        for number, attention in enumerate(attentions)
    ]
    fused = backend.fuse_layers(parts)
    for starts, lengths in STEPS:
        segments, pages = segments_of(starts, lengths)
        caches = [filled_cache(backend, shape, pages) for _ in parts]
        others, angles = copy.deepcopy(caches), angles_of(backend, shape, starts, lengths)
        x = first = guarded(values(sum(lengths), WIDTH, seed=12))
        expected = []
        for (attention, experts), cache in zip(parts, caches, strict=True):
            total, rows, _ = attention(x, angles, cache, segments)
            x, *chosen = experts(rows, [total], load := np.arange(EXPERTS))
            expected.append((x, *chosen, load))
        found = first
        for layers in (range(1), range(1, 3)):
            loads = [np.arange(EXPERTS) for _ in layers]
            found, *chosen = fused(layers, found, angles, others[layers.start : layers.stop], segments, loads)
            np.testing.assert_array_equal(found.view(np.uint32), expected[layers.stop - 1][0].view(np.uint32))
            for number, *of_layer in zip(layers, *chosen, loads, strict=True):
                for one, other in zip(of_layer, expected[number][1:], strict=True):
                    np.testing.assert_array_equal(one, other)
        for cache, other in zip(caches, others, strict=True):
            np.testing.assert_array_equal(other.keys, cache.keys)
            np.testing.assert_array_equal(other.values, cache.values)


def test_layers_of_other_shapes_are_not_fused():
    backend, norm = CompiledBackend(load_kernels(), precision="float32"), Norm("rms", 1e-6, values(WIDTH))
    parts = [
        (
            backend.fuse_attention(attention_of(backend, shape, True).block(norm, norm)),
            backend.fuse_experts(experts_block(backend, rule, clamp=None)),
        )
        for shape, rule in (
            (AttentionShape(2, 2, 16), Router(top_k=2)),
            (AttentionShape(2, 1, 16), Router(top_k=2)),
            (AttentionShape(2, 2, 16), Router(top_k=3)),
        )
    ]
    assert backend.fuse_layers([parts[0]] * 2) is not None
    assert all(backend.fuse_layers([parts[0], other]) is None for other in parts[1:])


def test_what_layer_c_does_not_compute_is_not_fused():
    backend = CompiledBackend(load_kernels(), precision="float32")
    router, experts = backend.matrix(stored(EXPERTS, WIDTH, seed=50)), experts_of(backend, clamp=None)
    plain = Expert(backend.matrix(stored(HIDDEN, WIDTH, seed=1)), experts[0].down, gated=False)
    for rule, of_rank in (
        (Router(top_k=2, scoring="sparsemixer"), experts),
        (Router(top_k=2), [plain] * EXPERTS),
        (Router(top_k=2), [*experts[1:], plain]),
    ):
        assert backend.fuse_experts(ExpertsBlock(router, None, rule, None, of_rank)) is None
    norm = Norm("rms", 1e-6, values(WIDTH))
    for shape, norms in (
        (AttentionShape(2, 2, 16, qk_norm="vector"), (norm, norm)),
        (AttentionShape(2, 2, 16, clip=1.0), (norm, norm)),
        (AttentionShape(2, 2, 16), (norm, Norm("layer", 1e-6, values(WIDTH), values(WIDTH)))),
    ):
        assert attention_of(backend, shape, norms_rounded=True).block(*norms) is None
