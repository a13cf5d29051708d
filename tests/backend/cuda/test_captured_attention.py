"""Attention as CUDA graphs: the bits of its verbs in every step, and what must not happen while work is captured."""

import gc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from moempi.arrays import narrow, round_to_bfloat16
from moempi.backend.cuda import captured_attention
from moempi.backend.cuda.attention import SPLIT_KEYS
from moempi.backend.cuda.attention_layout import StepLayouts
from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.cuda.captured_attention import GraphMemory
from moempi.backend.cuda.launches import Arena, Launches
from moempi.backend.values import PhysicalIds, Segment
from moempi.config.architecture import AttentionShape, Latent, Rope, Router
from moempi.config.tensors import PAGE_ROWS
from moempi.model.attention import Attention
from moempi.model.feed_forward import MixtureOfExperts
from moempi.model.latent_attention import LatentAttention
from moempi.model.norm import Norm
from moempi.model.transformer import Layer, with_graphs
from simt.device import SimtDevice

WIDTH, PAGES = 40, 64
SHAPES = {
    "plain": AttentionShape(2, 2, 16),
    "grouped": AttentionShape(6, 2, 24, qk_norm="head", rope=Rope(dim=10)),
    "biases and sinks": AttentionShape(4, 1, 32, biases="all", sinks=True, score_factor=0.7),
    "interleaved window": AttentionShape(3, 3, 16, rope=Rope(dim=16, interleaved=True), window=40),
    "gated": AttentionShape(2, 2, 16, output_gate=True),
    "normalized vectors, clipped": AttentionShape(2, 2, 16, qk_norm="vector", clip=1.5),
    "latent": AttentionShape(2, 2, 24, rope=Rope(dim=8), latent=Latent(32, rope_dim=8, value_dim=16, query_rank=8)),
    "latent keys alone": AttentionShape(
        3, 3, 24, rope=Rope(dim=8), latent=Latent(16, rope_dim=8, value_dim=16, query_rank=0)
    ),
}
NUM_IDS, PERIOD = 5, 2
RULE = Router(top_k=3, renormalize=True)
STEPS = [*[(250 + step, 3 + step, 61 + step) for step in range(9)], *[(12 + step, 70 + step) for step in range(4)]]
"""Where the sequences begin that have a row in each step: some of three sequences, then of two."""
PARTS = {"angles": "_angles", "positions": "_spans", "pages": "_pages"}


@pytest.fixture
def simulated():
    return SimtDevice(finds_races=False)


def values(*shape, seed):
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal(shape, np.float32))


class Layers:
    """Two layers of an attention, by the verbs and as graphs, each with a cache of the same values.

    If they are `routed`, a router is behind each, and the rows are packed.
    """

    def __init__(self, device, shape, *, precision="bfloat16", kind="rms", routed=False):
        self.device = device
        self.shape = shape
        self.packed = 0
        self.verbs, self.graphs = (
            CudaBackend(device, precision=precision, reproducible=False, capture=capture) for capture in (False, True)
        )
        make = self.latent_attention if shape.latent else self.attention
        self.attentions = [make(seed, kind) for seed in (1, 21)]
        weights = [Norm(kind, eps, self.rows(WIDTH, seed=seed)) for eps, seed in ((1e-6, 8), (1e-5, 9))]
        self.norms = weights
        router = self.verbs.matrix(narrow(values(6, WIDTH, seed=12)))
        experts = MixtureOfExperts(0, RULE, router, experts=()) if routed else None
        self.layers = [Layer(0, weights[0], attention, weights[1], experts) for attention in self.attentions]
        self.fused = [with_graphs(layer, self.graphs).fused_attention for layer in self.layers]
        ids = np.random.default_rng(0).integers(0, NUM_IDS, 6 * PERIOD)
        self.ids = PhysicalIds(self.verbs.upload(ids), NUM_IDS, PERIOD) if routed else None
        self.caches, self.others = ([self.cache() for _ in self.attentions] for _ in range(2))

    def rows(self, *shape, seed):
        return self.verbs.tensor(narrow(values(*shape, seed=seed)))

    def attention(self, seed, kind):
        shape, has_biases = self.shape, self.shape.biases == "all"
        heads, dim = shape.num_heads, shape.head_dim
        outputs = (heads + 2 * shape.num_kv_heads) * dim
        normalized = {"none": 0, "head": dim, "vector": dim}[shape.qk_norm]
        return Attention(
            shape,
            1e-6,
            qkv=self.verbs.matrix(narrow(values(outputs, WIDTH, seed=seed) / np.float32(4))),
            output=self.verbs.matrix(narrow(values(WIDTH, heads * dim, seed=seed + 1) / np.float32(4))),
            qkv_bias=self.rows(outputs, seed=3) if has_biases else None,
            output_bias=self.rows(WIDTH, seed=4) if has_biases else None,
            q_norm=self.rows(normalized * (heads if shape.qk_norm == "vector" else 1), seed=5) if normalized else None,
            k_norm=self.rows(normalized * (shape.num_kv_heads if shape.qk_norm == "vector" else 1), seed=6)
            if normalized
            else None,
            gate=self.verbs.matrix(narrow(values(heads * dim, WIDTH, seed=13))) if shape.output_gate else None,
            sinks=self.rows(heads, seed=7) if shape.sinks else None,
            window=shape.window,
            norms_rounded=kind == "rms",
        )

    def latent_attention(self, seed, kind):
        shape, latent = self.shape, self.shape.latent
        heads, plain = shape.num_heads, shape.head_dim - latent.rope_dim

        def matrix(outputs, inputs, number):
            return self.verbs.matrix(narrow(values(outputs, inputs, seed=seed + number) / np.float32(4)))

        def of_heads(inputs, outputs, number):
            return self.verbs.head_matrices(narrow(values(heads, inputs, outputs, seed=seed + number) / np.float32(4)))

        first, rank = latent.query_rank or heads * shape.head_dim, latent.key_value_rank
        return LatentAttention(
            shape,
            latent,
            down=matrix(first + rank + latent.rope_dim, WIDTH, 0),
            key_value_norm=self.rows(rank, seed=5),
            absorb_keys=of_heads(plain, rank, 1),
            expand_values=of_heads(rank, latent.value_dim, 2),
            output=matrix(WIDTH, heads * latent.value_dim, 3),
            queries=matrix(heads * shape.head_dim, first, 4) if latent.query_rank else None,
            query_norm=self.rows(first, seed=6) if latent.query_rank else None,
        )

    def cache(self):
        latent = self.shape.latent
        if latent:
            cache = self.verbs.cache(PAGES, 1, latent.key_value_rank + latent.rope_dim, latent=latent.key_value_rank)
        else:
            cache = self.verbs.cache(PAGES, self.shape.num_kv_heads, self.shape.head_dim)
        for held, seed in ((cache.keys, 10), (cache.values, 11))[: 1 if latent else 2]:
            self.device.copy(self.rows(*held.shape, seed=seed), held)
        return cache

    def check(self, starts, *, lengths=None, seed=0):
        """Compute a step both ways: one row, or `lengths`, of each sequence; its results and caches are equal."""
        lengths = lengths or [1] * len(starts)
        segments, angles = segments_of(starts, lengths, seed=seed), self.angles(starts, lengths)
        x = y = self.rows(sum(lengths), WIDTH, seed=30 + seed)
        for layer, fused, cache, other in zip(self.layers, self.fused, self.caches, self.others, strict=True):
            rows = layer.attention(self.verbs, self.norms[0](self.verbs, x), angles, cache, segments)
            expected = self.norms[1].of_sum(self.verbs, x, rows)
            *found, packed = fused(y, angles, other, segments, self.ids)
            assert_equal(self.verbs, found, expected)
            for held, others in ((cache.keys, other.keys), (cache.values, other.values))[
                : 1 if self.shape.latent else 2
            ]:
                assert_equal(self.verbs, [others], [held])
            if packed is not None:
                self.packed += 1
                assert_equal(self.verbs, packed, layer.feed_forward.pack(self.verbs, expected[1], self.ids))
            (x, _), y = expected, self.graphs.add(found[0], found[1])
            x = self.verbs.add(x, expected[1])

    def angles(self, starts, lengths):
        positions = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        dim = self.shape.rope.dim or self.shape.head_dim  # of latent attention the width of rotated keys
        frequencies = np.geomspace(1, 1e-3, dim // 2, dtype=np.float32)
        return self.verbs.rope_angles(np.concatenate(positions), frequencies=frequencies, amplitude=1.1)


def segments_of(starts, lengths, *, seed):
    """Sequences in pages that are others in each step."""
    pages = [-(-(start + length) // PAGE_ROWS) for start, length in zip(starts, lengths, strict=True)]
    order = np.split(np.random.default_rng(seed).permutation(PAGES)[: sum(pages)], np.cumsum(pages)[:-1])
    rows = np.cumsum([0, *lengths])[:-1].tolist()
    return [Segment(*one) for one in zip(rows, lengths, starts, order, strict=True)]


def assert_equal(backend, found, expected):
    for some, others in zip(found, expected, strict=True):
        np.testing.assert_array_equal(backend.download(some), backend.download(others))


def count_captures(monkeypatch, device):
    """How often the device captures work."""
    counts, capture = Counter(), device.capture

    def counted(submit):
        counts["captures"] += 1
        return capture(submit)

    monkeypatch.setattr(device, "capture", counted)
    return counts


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_graphs_have_the_bits_of_the_verbs_in_every_step(monkeypatch, capturing_device, shape, precision):
    """Rows, positions, pages and splits change; each layer records a graph for each number of splits once."""
    layers, counts = Layers(capturing_device, shape, precision=precision), count_captures(monkeypatch, capturing_device)
    for step, starts in enumerate(STEPS):
        layers.check(starts, seed=step)
    kinds = Counter((len(starts), max(starts) // SPLIT_KEYS) for starts in STEPS)
    assert kinds == {(3, 0): 6, (3, 1): 3, (2, 0): 4}
    assert counts["captures"] == 2 * 2


@pytest.mark.parametrize("shape", ["plain", "latent"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_graphs_choose_experts_and_pack_rows_as_the_verbs(monkeypatch, capturing_device, shape, precision):
    """Padding rows are neither packed nor counted: below, at and above the rows of a graph."""
    layers = Layers(capturing_device, SHAPES[shape], precision=precision, routed=True)
    counts = count_captures(monkeypatch, capturing_device)
    for step in range(3):
        for count in (1, 15, 16, 17):
            layers.check([3 + 2 * row + step for row in range(count)], seed=100 * step + count)
    assert counts["captures"] == 2 * 2
    assert layers.packed == 2 * 3 * 4


def test_choices_of_rows_that_are_none_are_found_if_they_are_packed(monkeypatch, simulated):
    """The planted fault: all rows of a graph are packed and counted."""
    monkeypatch.setattr(StepLayouts, "placed_spans", None)
    with pytest.raises(AssertionError):
        Layers(simulated, SHAPES["plain"], routed=True).check((5, 80))


def test_more_choices_than_one_kernel_packs_are_not_recorded(monkeypatch, simulated):
    """The number of a graph's rows counts, with those that are none."""
    layers = Layers(simulated, SHAPES["plain"], routed=True)
    monkeypatch.setattr(CudaBackend, "most_packed_choices", 16 * RULE.top_k)
    for step in range(3):
        layers.check(range(3 + step, 19 + step), seed=step)
    assert layers.packed == 6
    for step in range(3):
        layers.check(range(3 + step, 20 + step), seed=10 + step)
    assert layers.packed == 6


def test_graphs_have_the_bits_of_a_norm_that_is_rounded_once(capturing_device):
    layers = Layers(capturing_device, SHAPES["plain"], kind="rms_float32")
    for step in range(4):
        layers.check((5 + step, 80 + step), seed=step)


def test_a_step_with_a_prompt_is_computed_by_the_verbs(monkeypatch, capturing_device):
    """Then the graphs of the steps around it are launched again."""
    layers, counts = Layers(capturing_device, SHAPES["plain"]), count_captures(monkeypatch, capturing_device)
    for step in range(6):
        layers.check((5 + step, 80 + step), seed=step)
        layers.check((0, 90 + step), lengths=[40, 1], seed=50 + step)
    assert counts["captures"] == 2


def test_rows_of_a_short_prompt_are_recorded_as_any(monkeypatch, capturing_device):
    layers, counts = Layers(capturing_device, SHAPES["plain"]), count_captures(monkeypatch, capturing_device)
    for step in range(4):
        layers.check((5 * step, 80 + step), lengths=[5, 1], seed=step)
    assert counts["captures"] == 2


def test_each_queue_has_graphs_and_memory_of_its_own(monkeypatch, capturing_device):
    layers, counts = Layers(capturing_device, SHAPES["plain"]), count_captures(monkeypatch, capturing_device)
    layers.verbs.finish_loading()
    for step in range(4):
        for queue in (0, 1):
            with layers.verbs.on_queue(queue):
                layers.check((5 + step, 80 + step), seed=step + 10 * queue)
    assert counts["captures"] == 4
    assert len(layers.graphs._graph_memories) == 2


def test_the_graph_that_was_launched_longest_ago_makes_way_when_it_is_idle(monkeypatch, simulated):
    """For one of the same queue; what was measured once is recorded in the next call."""
    monkeypatch.setattr(captured_attention, "MOST_GRAPHS", 2)
    monkeypatch.setattr(captured_attention, "IDLE", 3)
    layers, counts = Layers(simulated, SHAPES["plain"]), count_captures(monkeypatch, simulated)

    def run(*kinds, queue=0):
        before = counts["captures"]
        with layers.verbs.on_queue(queue):
            for step, count in enumerate(kinds):
                layers.check(range(3, 3 + 16 * count), seed=step)
        return (counts["captures"] - before) // 2

    layers.verbs.finish_loading()
    assert run(1, 1, 2, 2, 1, 2) == 2
    assert run(3, 3, 1, 2) == 0  # no graph is idle: computed by the verbs
    assert run(1, 1, 2, 2, queue=1) == 2
    assert run(2, 2, 2, 3) == 1  # in the place of the first
    assert run(1, 2, 3, 1, 2, 3) == 0
    assert run(3, 3, 3, 1) == 1  # in the place of the second


def test_more_kinds_in_turn_than_graphs_are_recorded_once(monkeypatch, simulated):
    """The kinds beyond the graphs' number are computed by the verbs; no recording makes way for the next."""
    monkeypatch.setattr(captured_attention, "MOST_GRAPHS", 2)
    layers, counts = Layers(simulated, SHAPES["plain"]), count_captures(monkeypatch, simulated)
    for turn in range(4):
        for number, count in enumerate((1, 17, 33)):
            layers.check([3 + 2 * row + turn for row in range(count)], seed=10 * turn + number)
    assert counts["captures"] == 2 * 2


def test_rows_that_are_none_write_to_no_page(monkeypatch, simulated):
    """The planted fault: rows beyond the step's are rows of the step before."""
    layers, copy = Layers(simulated, SHAPES["plain"]), simulated.copy
    for step in range(3):
        layers.check((5 + step, 80 + step, 20 + step), seed=step)
        layers.check((30 + step,), seed=10 + step)
    no_rows = next(iter(layers.graphs._graph_memories.values()))._no_rows
    monkeypatch.setattr(simulated, "copy", lambda x, out: None if np.may_share_memory(x, no_rows) else copy(x, out))
    layers.check((8, 83, 23), seed=3)
    with pytest.raises(AssertionError):
        layers.check((33,), seed=13)


def test_a_step_of_any_number_of_rows_has_the_bits_of_the_verbs(capturing_device):
    """Below, at and above the numbers of rows of a graph."""
    layers = Layers(capturing_device, SHAPES["plain"])
    for step in range(3):
        for count in (1, 15, 16, 17, 33):
            layers.check([3 + 2 * row + step for row in range(count)], seed=100 * step + count)


@pytest.mark.parametrize("rows_of_a_launch", [1, 2])
def test_launches_for_some_of_the_rows_share_their_sums(monkeypatch, capturing_device, rows_of_a_launch):
    """Long sequences take no more memory of a graph than PARTIAL_BYTES and the rows."""
    shape, name = SHAPES["grouped"], "moempi.backend.cuda.attention.PARTIAL_BYTES"
    row_bytes, sizes = shape.num_heads * 2 * shape.head_dim * 4, []
    for rows in (rows_of_a_launch, 3):
        monkeypatch.setattr(name, rows * row_bytes)
        layers, counts = Layers(capturing_device, shape), count_captures(monkeypatch, capturing_device)
        for step in range(3):
            layers.check((300 + step, 3 + step, 61 + step), seed=step)
        assert counts["captures"] == 2
        sizes += layers.fused[0]._sizes.values()
    assert sizes[1] - sizes[0] >= (3 - rows_of_a_launch) * row_bytes - 256


def test_more_pages_than_the_cache_has_are_not_recorded(monkeypatch, simulated):
    """The inputs have room for each page of the cache once; a warm-up repeats the first page."""
    layers, counts = Layers(simulated, SHAPES["plain"]), count_captures(monkeypatch, simulated)
    segments, backend = [Segment(0, 1, 80, np.zeros(PAGES + 1, np.int64))], layers.graphs
    for _ in range(3):
        layers.fused[0](layers.rows(1, WIDTH, seed=1), layers.angles([80], [1]), layers.others[0], segments)
    backend.download(layers.others[0].keys)
    assert not counts


def test_a_launch_is_two_submissions(monkeypatch, simulated):
    """The rows are copied to where the graph reads them; what the step's layers share is copied once."""
    layers, names, submit = Layers(simulated, SHAPES["grouped"]), [], simulated.submit
    for step in range(3):
        layers.check((5 + step, 80 + step), seed=step)
    segments, angles = segments_of((8, 83), (1, 1), seed=9), layers.angles((8, 83), (1, 1))
    x = layers.rows(2, WIDTH, seed=1)
    monkeypatch.setattr(simulated, "submit", lambda name, *given: (names.append(name), submit(name, *given)))
    for fused, cache in zip(layers.fused, layers.others, strict=True):
        fused(x, angles, cache, segments)
    assert names == ["upload", *["copy"] * 5, "copy", "graph", "copy", "graph"]


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_an_input_that_is_not_copied_is_found(monkeypatch, simulated, part):
    """The planted fault: the graphs of all steps read what the first of them was given."""
    layers, place = Layers(simulated, SHAPES["plain"]), GraphMemory._place_step
    first = []

    def place_once(self, inputs):
        held = getattr(self, part)
        if len(first) == 1:
            spare = [simulated.empty(x.shape, x.dtype) for x in (held if part == "_angles" else [held])]
            monkeypatch.setattr(self, part, spare if part == "_angles" else spare[0])
        placed = place(self, inputs)
        monkeypatch.setattr(self, part, held)
        first.append(placed)
        return placed

    monkeypatch.setattr(GraphMemory, "_place_step", place_once)
    for step in range(2):
        layers.check((5 + step, 80 + step), seed=step)
    with pytest.raises(AssertionError):
        layers.check((7, 82), seed=2)


FAULTS = {
    "an allocation of the pool": (lambda device, _: device.empty((4,), np.uint8), "an allocation"),
    "an allocation of the driver": (lambda device, _: device.comm_buffer((4,), np.uint8), "an allocation"),
    "an allocation for others": (lambda device, _: device.allocate_shared((4,), np.uint8), "an allocation"),
    "an upload": (lambda device, _: device.upload(np.zeros(4, np.uint8)), "an upload from pageable memory"),
    "a download": (lambda device, given: device.download(given.rows), "a wait of the host"),
    "a download without wait": (lambda device, given: device.start_download(given.rows), "a download to new memory"),
    "a wait": (lambda _, given: given.event.synchronize(), "a wait of the host"),
    "a poll": (lambda _, given: given.event.is_done(), "a query of an event"),
    "an event": (lambda device, _: device.record_event(), "an event"),
    "another queue": (lambda device, _: device.use_queue(1), "another queue"),
    "a free": (lambda device, given: device.unregister_host_memory(given.memory), "a free"),
    "another graph": (lambda device, given: device.launch_graph(given.graph), "another graph"),
    "another capture": (lambda device, _: device.capture(lambda: None), "another capture"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_what_a_graph_cannot_have_is_an_error_under_capture(simulated, fault, message):
    """And nothing is recorded: the device goes on as before."""
    rows = simulated.upload(np.arange(4))
    out = simulated.empty((4,), np.int64)
    given = SimpleNamespace(
        rows=rows,
        event=simulated.record_event(),
        memory=np.zeros(4, np.uint8),
        graph=simulated.capture(lambda: simulated.copy(rows, out)),
    )
    with pytest.raises(RuntimeError, match=f"^{message} under capture$"):
        simulated.capture(lambda: (simulated.copy(rows, out), fault(simulated, given)))
    assert (simulated.download(out) == -1).all()
    simulated.launch_graph(given.graph)
    np.testing.assert_array_equal(simulated.download(out), np.arange(4))


def test_an_error_of_the_work_ends_the_capture(device):
    rows = device.upload(np.arange(4))
    with pytest.raises(ZeroDivisionError):
        device.capture(lambda: 1 // 0)
    np.testing.assert_array_equal(device.download(rows), np.arange(4))
    device.use_queue(1)
    device.use_queue(0)


def test_captured_work_is_done_by_each_launch_and_not_before(device):
    """With the values that its arrays have then."""
    source, out = (device.upload(np.full(4, number, np.int64)) for number in (1, 2))
    graph = device.capture(lambda: device.copy(source, out))
    np.testing.assert_array_equal(device.download(out), [2] * 4)
    for number in (3, 4):
        device.copy(device.upload(np.full(4, number, np.int64)), source)
        device.launch_graph(graph)
        np.testing.assert_array_equal(device.download(out), [number] * 4)


def test_a_graph_keeps_the_arrays_of_its_work(simulated):
    """Those that nobody else holds are freed with it."""
    out, before = simulated.empty((4,), np.int64), simulated.live_bytes

    def recorded():
        source, between = simulated.upload(np.arange(4)), simulated.empty((4,), np.int64)
        return simulated.capture(lambda: (simulated.copy(source, between), simulated.copy(between, out)))

    graph = recorded()
    gc.collect()
    simulated.launch_graph(graph)
    np.testing.assert_array_equal(simulated.download(out), np.arange(4))
    assert simulated.live_bytes == before + 2 * 32
    del graph
    gc.collect()
    assert simulated.live_bytes == before


def test_memory_that_a_graph_uses_must_not_be_unregistered_or_unmapped(simulated):
    registered, mapped = np.zeros(32, np.uint8), simulated.allocate_shared((4,), np.int64)
    rows = simulated.empty((4,), np.int64)
    simulated.register_host_memory(registered)
    read = simulated.capture(lambda: simulated.copy(registered[8:16].view(np.int64), rows[:1]))
    written = simulated.capture(lambda: simulated.copy(rows, mapped))
    with pytest.raises(RuntimeError, match="a graph uses memory that is freed"):
        simulated.unregister_host_memory(registered)
    with pytest.raises(RuntimeError, match="a graph uses memory that is freed"):
        simulated.unmap_shared(mapped)
    del read, written
    gc.collect()
    simulated.unregister_host_memory(registered)
    simulated.unmap_shared(mapped)


def test_a_verb_that_takes_memory_of_the_pool_under_capture_is_found(monkeypatch, simulated):
    """The planted fault: the sums of products with a bias are allocated beside the arena."""
    layers = Layers(simulated, SHAPES["biases and sinks"])
    monkeypatch.setattr(Launches, "empty", lambda self, shape, dtype: simulated.empty(shape, dtype))
    layers.check((5, 80))
    with pytest.raises(RuntimeError, match="an allocation under capture"):
        layers.check((6, 81))


def test_what_is_made_on_first_use_under_capture_is_found(monkeypatch, simulated):
    """The planted fault: a graph is recorded in the first call.

    In it kernels are loaded, if no other has launched them, and the counters of splits are uploaded.
    """
    layers = Layers(simulated, SHAPES["plain"])

    def record_at_once(self, inputs, cache, kind):
        return self._record(inputs, cache, Arena(simulated.empty, simulated.empty((1 << 20,), np.uint8)), None).results

    monkeypatch.setattr(captured_attention.CapturedAttention, "_measure", record_at_once)
    x, angles, segments = layers.rows(1, WIDTH, seed=1), layers.angles([5], [1]), segments_of([5], [1], seed=0)
    simulated._loaded.clear()
    with pytest.raises(RuntimeError, match="a first launch under capture"):
        layers.fused[0](x, angles, layers.others[0], segments)
    with pytest.raises(RuntimeError, match="an upload from pageable memory under capture"):
        layers.check((300, 5))


def test_an_arena_that_is_too_small_is_an_error(simulated):
    arena = Arena(simulated.empty, simulated.empty((1024,), np.uint8))
    first, second = arena((3, 5), np.float32), arena((300,), np.uint16)
    assert not np.may_share_memory(first, second)
    assert (first.shape, first.dtype, second.shape, second.dtype) == ((3, 5), np.float32, (300,), np.uint16)
    assert [(values.ctypes.data - first.ctypes.data) % 256 for values in (first, second)] == [0, 0]
    with pytest.raises(RuntimeError, match="an arena of 1024 bytes has no 4 bytes from 1024 on"):
        arena((1,), np.float32)


def test_a_backend_without_capture_has_no_graphs(simulated):
    layers = Layers(simulated, SHAPES["plain"])
    assert with_graphs(layers.layers[0], layers.verbs).fused_attention is None
