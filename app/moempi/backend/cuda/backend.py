"""The GPU backend: CUDA kernels on a `Device`, and matrix products by the device's library.

Rows, weights and the cache are bfloat16 bits, or float32 throughout. Every verb but `download`, `sample`, `score` and
`scan` returns when its work is submitted; while these wait, they call `progress`, so that the transfers of all lanes
advance. `finish_loading` and the upload of a large array block without it. Matrices stay as they are stored. With
`reproducible`, each row's bits are independent of the other rows: products.py makes calls of one size, few_rows.py
computes experts in parts of few rows where it can, and attention goes row by row.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, IntArray
from moempi.backend.cuda.attention import ROTATED_NUMBERS, PagedAttention, Queries, Rule
from moempi.backend.cuda.attention_layout import AttentionLayout, is_latent, lay_out_rows, tile_kernel
from moempi.backend.cuda.captured_attention import CapturedAttention, GraphMemory
from moempi.backend.cuda.delta_rule import StateVerbs
from moempi.backend.cuda.device import Argument, Device
from moempi.backend.cuda.few_rows import ExpertRows, FewRows, expert_rows
from moempi.backend.cuda.launches import Launches, extents, norm_threads, rows_from
from moempi.backend.cuda.peer_memory import DevicePeerMemory
from moempi.backend.cuda.products import Matrix, Products
from moempi.backend.cuda.selection import Selection
from moempi.backend.protocol import Download, Event, FusedAttention, FusedExperts, FusedLayers
from moempi.backend.sampling import sample_tokens
from moempi.backend.scores import SUM_TOKENS
from moempi.backend.values import (
    Array,
    AttentionBlock,
    Cache,
    DeltaRates,
    Expert,
    ExpertsBlock,
    LayerState,
    LogitScan,
    RmsNorm,
    SampledTokens,
    SamplingRequests,
    Segment,
    StateConstants,
    Stored,
    take_likeliest,
)
from moempi.config.architecture import Clamp, DeltaRule, Router, StateSpace
from moempi.config.tensors import PAGE_ROWS
from moempi.errors import ConfigError

COMBINED_NUMBERS = 1024
"""Numbers of a row per block of `combine`."""
KEPT_LAYOUTS = 3
"""Layouts of rows that a queue keeps: all rows of a step, and with sparse attention the sparse ones and the others."""
GROUPED_CHOICES = 8
"""Choices per thread of kernels/grouping.cu; more than a block's are sorted by several blocks."""
MOST_IDS = 8192
"""Physical experts of a layer that kernels/grouping.cu sorts by."""
MOST_CHOICES = 2048
"""Choices that are sorted and packed by one kernel; equals MOST_CHOICES of kernels/packing.cu."""
SCORING = {"softmax": 0, "sigmoid": 1, "softmax_chosen": 2}
UNCHANGED = nullcontext()
"""The queue stays the current one."""


class CudaBackend:
    """The verbs of `protocol.Backend` on a GPU."""

    name = "cupy"
    widened = False
    most_packed_choices = MOST_CHOICES

    def __init__(
        self,
        device: Device,
        *,
        precision: str,
        reproducible: bool,
        capture: bool = False,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self.device = device
        self.queue = device.queue
        self.memory_id = device.memory_id
        self.comm_buffers_on_host = device.comm_buffers_on_host
        self.is_bfloat16 = precision == "bfloat16"
        self.reproducible = reproducible or not self.is_bfloat16
        self.row_dtype = np.dtype(np.uint16 if self.is_bfloat16 else np.float32)
        self.peer_memory = DevicePeerMemory(device, row_dtype=self.row_dtype)
        self._launches = Launches(device, row_dtype=self.row_dtype)
        self._attention = PagedAttention(self._launches)
        self._selection = Selection(self._launches, self._attention)
        self._products = Products(self._launches, reproducible=self.reproducible)
        self._few_rows = FewRows(self._launches, always=self.reproducible)
        self._progress = progress
        self._layouts: dict[int, deque[AttentionLayout]] = {}
        self._states = StateVerbs(self._launches, upload=self.upload)
        self._frequencies: dict[tuple[int, bytes], Array] = {}
        self._capture = capture
        self._graph_memories: dict[tuple[int, ...], GraphMemory] = {}

    # Memory

    def available_bytes(self) -> int:
        return self.device.available_bytes()

    def tensor(self, *stored: Stored) -> Array:
        """Stored float32 values stay float32."""
        whole = self.device.upload(stored[0] if len(stored) == 1 else np.concatenate(stored))
        return whole if self.is_bfloat16 or whole.dtype == np.float32 else self._launches.widened(whole)

    def matrix(self, *stored: Stored, transposed: bool = False) -> Matrix:
        whole = stored[0] if len(stored) == 1 else np.concatenate(stored, axis=1 if transposed else 0)
        return Matrix(self.tensor(whole), transposed)

    def cache(self, pages: int, kv_heads: int, head_dim: int, *, latent: int = 0) -> Cache:
        shape = (pages * PAGE_ROWS, kv_heads, head_dim)
        keys = self._launches.rows(shape)
        shared = keys if latent == head_dim else keys[..., :latent]
        cache = Cache(keys=keys, values=shared if latent else self._launches.rows(shape))
        self.clear(cache, np.arange(pages))
        return cache

    def clear(self, cache: Cache, pages: IntArray) -> None:
        numbers = PAGE_ROWS * prod(cache.keys.shape[1:])
        index = self.upload(pages)
        for held in (cache.keys,) if is_latent(cache) else (cache.keys, cache.values):
            self._launches.launch("kv_cache", "clear_pages", (len(pages), 1, 1), 1024, held, index, numbers)

    def on_queue(self, number: int) -> AbstractContextManager[None]:
        return UNCHANGED if number == self.queue else self._on_other_queue(number)

    @contextmanager
    def _on_other_queue(self, number: int) -> Iterator[None]:
        before = self.queue
        self._use_queue(number)
        try:
            yield
        finally:
            self._use_queue(before)

    def _use_queue(self, number: int) -> None:
        self.device.use_queue(number)
        self.queue = number

    def record_event(self) -> Event:
        return self.device.record_event()

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        self.device.register_host_memory(memory)

    def unregister_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        self.device.unregister_host_memory(memory)

    def comm_buffer(self, rows: int, width: int) -> Array:
        return self.device.comm_buffer((rows, width), self.row_dtype)

    def rows_in(self, buffer: Array) -> Array | None:
        return buffer if self.device.holds(buffer) else None

    def row_buffer(self, rows: int, width: int) -> Array:
        return self.device.empty((rows, width), self.row_dtype)

    def upload(self, values: Array) -> Array:
        """Integers become int32, floats float32. An array of the device is returned as it is."""
        if self.device.holds(values):
            return values
        kind = np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32
        return self.device.upload(values.astype(kind, copy=False))

    def download(self, values: Array) -> npt.NDArray[Any]:
        (on_host,) = self._download(values)
        return on_host

    def _download(self, *arrays: Array) -> list[npt.NDArray[Any]]:
        """Copies of all arrays, for which the host waits once."""
        download = self.start_download(*arrays)
        while not (download.event is None or download.event.is_done()):
            self._progress()
            os.sched_yield()
        return download.values()

    def start_download(self, *arrays: Array) -> Download:
        memory = [self.device.start_download(values) for values in arrays]
        return Download(self.device.record_event(), memory)

    def head_matrices(self, stored: Stored) -> Array:
        return self.tensor(stored)

    def table(self, stored: Stored) -> Array:
        return self.tensor(stored)

    def finish_loading(self) -> None:
        self.device.record_event().synchronize()
        self.device.free_unused()

    # Rows

    def embed(self, tokens: IntArray, table: Array) -> Array:
        return self.take_rows(table, tokens)

    def rms_norm(self, x: Array, weight: Array, *, eps: float, rounded: bool = True) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.by_norm("rms_norm", out, x, weight, out, *extents(x), eps, rounded, weight=weight)
        return out

    def add_rms_norm(
        self, x: Array, y: Array, weight: Array, *, eps: float, rounded: bool = True
    ) -> tuple[Array, Array]:
        total, out = self._launches.rows(x.shape), self._launches.rows(x.shape)
        (*_, width, x_stride, _), (*_, y_stride, _) = extents(x), extents(y)
        sizes = (width, x_stride, y_stride, eps, rounded)
        self._launches.by_norm("add_rms_norm", out, x, y, weight, total, out, *sizes, weight=weight)
        return total, out

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.by_vector("norm", "layer_norm", out, x, weight, bias, out, *extents(x), eps)
        return out

    def linear(self, x: Array, matrix: Matrix, bias: Array | None = None) -> Array:
        out = self._launches.rows((len(x), matrix.outputs))
        if bias is None:
            self._products.product(x, matrix, out)
        else:
            self._products.biased(x, matrix, bias, out)
        return out

    def linear_heads(self, x: Array, matrices: Array) -> Array:
        out = self._launches.rows((*x.shape[:2], matrices.shape[-1]))
        self._products.by_head(x, matrices, out)
        return out

    def clip(self, x: Array, limit: float) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.by_vector("elementwise", "clip", out, x, out, *extents(x), limit)
        return out

    def join_columns(self, *parts: Array) -> Array:
        width = sum(part.shape[-1] for part in parts)
        out, first = self._launches.rows((*parts[0].shape[:-1], width)), 0
        for part in parts:
            sizes = (*extents(part), first, width)
            self._launches.by_vector("elementwise", "copy_columns", out, part, out, *sizes)
            first += part.shape[-1]
        return out

    def add(self, x: Array, y: Array) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.flat("add", prod(out.shape), x, y, out)
        return out

    def swiglu(self, gate_up: Array, clamp: Clamp | None = None) -> Array:
        hidden = gate_up.shape[1] // 2
        out = self._launches.rows((len(gate_up), hidden))
        alpha, limit = (clamp.alpha, clamp.limit) if clamp else (0.0, 0.0)
        rule = (hidden, alpha, limit)
        self._launches.by_vector("elementwise", "swiglu", out, gate_up, out, *rule)
        return out

    def squared_relu(self, x: Array) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.flat("squared_relu", prod(out.shape), x, out)
        return out

    def scale_by_sigmoid(self, x: Array, logits: Array) -> Array:
        out = self._launches.rows(x.shape)
        if logits.shape == x.shape and x.shape[1] > 1:
            self._launches.flat("scale_by_sigmoids", prod(out.shape), x, logits, out)
            return out
        self._launches.by_vector("elementwise", "scale_by_sigmoid", out, x, logits, out, x.shape[1])
        return out

    # Attention

    def rope_angles(self, positions: IntArray, *, frequencies: Float32Array, amplitude: float) -> tuple[Array, Array]:
        shape = (len(positions), len(frequencies))
        cosines, sines = self.device.empty(shape, np.float32), self.device.empty(shape, np.float32)
        sizes = (shape[0], shape[1], amplitude)
        given = (self.upload(positions), self._uploaded_frequencies(frequencies))
        self._launches.launch(
            "rope", "rope_angles", (-(-prod(shape) // 256), 1, 1), 256, *given, cosines, sines, *sizes
        )
        return cosines, sines

    def _uploaded_frequencies(self, frequencies: Float32Array) -> Array:
        """The frequencies of a model, which each step needs; uploaded once for each queue, whose work is in order."""
        key = (self.queue, frequencies.tobytes())
        if key not in self._frequencies:
            self._frequencies[key] = self.upload(frequencies)
        return self._frequencies[key]

    def rotate(self, x: Array, angles: tuple[Array, Array], *, interleaved: bool = False) -> Array:
        out = self._launches.rows(x.shape)
        heads, dim, *strides = extents(x)
        sizes = (heads, dim, angles[0].shape[1], *strides, interleaved)
        grid = (len(x), -(-prod(x.shape[1:]) // ROTATED_NUMBERS), 1)
        self._launches.launch("rope", "rotate", grid, 128, x, *angles, out, *sizes)
        return out

    def extend_cache(self, cache: Cache, keys: Array, values: Array | None, segments: Sequence[Segment]) -> None:
        self._attention.extend_cache(cache, keys, values, self._attention_layout(cache, segments))

    def rotate_into_cache(
        self,
        heads: tuple[Array, Array, Array],
        angles: tuple[Array, Array],
        *,
        cache: Cache,
        segments: Sequence[Segment],
        interleaved: bool = False,
        norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> Array:
        layout = self._attention_layout(cache, segments)
        return self._attention.rotate_into_cache(heads, angles, cache, layout, interleaved=interleaved, norms=norms)

    def extend_latent_cache(
        self,
        keys: tuple[Array, Array],
        angles: tuple[Array, Array],
        *,
        norm: RmsNorm,
        cache: Cache,
        segments: Sequence[Segment],
        interleaved: bool = False,
        queries: tuple[Array, RmsNorm] | None = None,
    ) -> Array | None:
        layout = self._attention_layout(cache, segments)
        (_, kept, kept_stride, _), (_, dim, key_stride, _) = map(extents, keys)
        latent, query_norm = queries or (None, None)
        out = None if latent is None else self._launches.rows(latent.shape)
        _, query_dim, query_stride, _ = (0, 0, 0, 0) if latent is None else extents(latent)
        weights = (query_norm and query_norm.weight, norm.weight)
        given = (latent, *keys, *weights, *angles, layout.spans, layout.pages, out, cache.keys)
        sizes = (query_dim, kept, dim, angles[0].shape[1], query_stride, kept_stride, key_stride, interleaved)
        grid, threads = (len(keys[0]), 1, 1), 128
        if latent is not None:
            grid, threads = (len(keys[0]), 2, 1), norm_threads(query_dim)
        eps = (query_norm.eps if query_norm else 0.0, norm.eps)
        constants = self._launches.weight_type(norm.weight)
        self._launches.launch("rope", "extend_latent_cache", grid, threads, *given, *sizes, *eps, **constants)
        return out

    def attend_latent(
        self,
        queries: tuple[Array, Array],
        angles: tuple[Array, Array],
        cache: Cache,
        segments: Sequence[Segment],
        *,
        scale: float,
        interleaved: bool = False,
    ) -> Array:
        both, rule = Queries(*queries, angles, interleaved), Rule(scale, 0, None)
        return self._attention.attend_latent(both, cache, self._attention_layout(cache, segments), rule)

    def attend(
        self,
        queries: Array,
        cache: Cache,
        segments: Sequence[Segment],
        *,
        scale: float,
        window: int = 0,
        sinks: Array | None = None,
    ) -> Array:
        """A sequence of many new rows is attended in tiles on tensor cores, one of few row by row."""
        rule = Rule(scale, window, sinks)
        return self._attention.attend(queries, cache, self._attention_layout(cache, segments), rule)

    def select_positions(
        self, queries: Array, weights: Array, index: Cache, segments: Sequence[Segment], *, top_k: int
    ) -> Array:
        return self._selection.positions(queries, weights, index, self._attention_layout(index, segments), top_k=top_k)

    def attend_selected(
        self, queries: Array, cache: Cache, segments: Sequence[Segment], positions: Array, *, scale: float
    ) -> Array:
        layout = self._attention_layout(cache, segments)
        return self._selection.attend(queries, cache, layout, positions, Rule(scale, 0, None))

    def _attention_layout(self, cache: Cache, segments: Sequence[Segment]) -> AttentionLayout:
        """The layout of a step's rows is the same in all layers, so it is kept until the queue's next steps."""
        kept = self._layouts.get(self.queue)
        if kept is None:
            kept = self._layouts[self.queue] = deque(maxlen=KEPT_LAYOUTS)
        for layout in kept:
            if layout.segments is segments:
                return layout
        kernel = None if self.reproducible else tile_kernel(cache, has_warpgroups=self.device.has_warpgroups)
        kept.append(lay_out_rows(segments, tile_kernel=kernel, upload=self.upload))
        return kept[-1]

    # States

    def layer_state(self, slots: int, rule: DeltaRule | StateSpace) -> LayerState:
        return self._states.layer_state(slots, rule)

    def causal_conv(
        self, x: Array, taps: Array, state: LayerState, segments: Sequence[Segment], bias: Array | None = None
    ) -> Array:
        return self._states.causal_conv(x, taps, state, segments, bias)

    def delta_rule(
        self,
        heads: tuple[Array, Array, Array],
        rates: Array,
        constants: DeltaRates,
        state: LayerState,
        segments: Sequence[Segment],
    ) -> Array:
        return self._states.delta_rule(heads, rates, constants, state, segments)

    def state_space(
        self,
        heads: tuple[Array, Array, Array],
        steps: Array,
        constants: StateConstants,
        state: LayerState,
        segments: Sequence[Segment],
        *,
        least_step: float,
    ) -> Array:
        return self._states.state_space(heads, steps, constants, state, segments, least_step=least_step)

    def gated_norm(self, x: Array, gate: Array, norm: RmsNorm) -> Array:
        return self._states.gated_norm(x, gate, norm)

    # Experts

    def choose_experts(
        self,
        logits: Array,
        router: Router,
        *,
        correction: Array | None = None,
        selection_bias: Float32Array | None = None,
    ) -> tuple[Array, Array]:
        rows, num_experts = logits.shape
        experts = self.device.empty((rows, router.top_k), np.int32)
        weights = self.device.empty((rows, router.top_k), np.float32)
        if router.scoring == "sparsemixer":
            rule: tuple[Argument, ...] = (rows, router.jitter, *_rounding(router))
            self._launches.by_router("choose_sparsemixer", num_experts, logits, experts, weights, *rule)
            return experts, weights
        bias = None if selection_bias is None else self.upload(selection_bias)
        groups = (router.num_groups, router.kept_groups, 2 if router.group_score == "top2" else 1)
        rule = (rows, router.top_k, SCORING[router.scoring], *groups)
        given = (logits, correction, bias, experts, weights)
        self._launches.by_router("choose_experts", num_experts, *given, *rule, *_weighing(router), *_rounding(router))
        return experts, weights

    def pick_replicas(self, experts: Array, period: int) -> Array:
        out = self.device.empty(experts.shape, np.int32)
        count, sizes = prod(out.shape), (prod(out.shape), out.shape[1], period)
        self._launches.launch("grouping", "pick_replicas", (-(-count // 256), 1, 1), 256, experts, out, *sizes, IDS=64)
        return out

    def weigh_experts(self, logits: Array, experts: Array, router: Router) -> Array:
        weights = self.device.empty(experts.shape, np.float32)
        rule = (len(experts), experts.shape[1], SCORING[router.scoring], *_weighing(router), *_rounding(router))
        self._launches.by_router("weigh_experts", logits.shape[1], logits, experts, weights, *rule)
        return weights

    def group(self, experts: Array, physical_ids: Array, *, num_ids: int) -> tuple[Array, Array, Array]:
        choices, slots = prod(experts.shape), experts.shape[1]
        if not choices:
            return self.upload(np.zeros(0, np.int32)), experts, self.upload(np.zeros(num_ids, np.int32))
        source_rows, output_rows = self.device.empty((choices,), np.int32), self.device.empty(experts.shape, np.int32)
        counts, ids = self.device.empty((num_ids,), np.int32), max(64, 1 << (num_ids - 1).bit_length())
        if ids > MOST_IDS:
            raise ConfigError(
                f"a layer has {num_ids} physical experts; the GPU backend takes at most {MOST_IDS}: use fewer replicas"
            )
        threads = 32 * min(8, MOST_IDS // ids)
        blocks = min(1024, -(-choices // (threads * GROUPED_CHOICES)))
        given, before = (experts, self.upload(physical_ids)), None
        if blocks > 1:
            before = self.device.empty((num_ids, blocks), np.int32)
            counted = (*given, before, choices, num_ids)
            self._launches.launch("grouping", "count_choices", (blocks, 1, 1), threads, *counted, IDS=ids)
            scan_threads = 32 * -(-blocks // 32)
            scanned = (before, counts, blocks)
            self._launches.launch("grouping", "scan_blocks", (num_ids, 1, 1), scan_threads, *scanned, IDS=ids)
        results, sizes = (source_rows, output_rows, counts), (choices, slots, num_ids)
        self._launches.launch("grouping", "group", (blocks, 1, 1), threads, *given, before, *results, *sizes, IDS=ids)
        return source_rows, output_rows, counts

    def group_and_pack(
        self, rows: Array, experts: Array, physical_ids: Array, out: Array, *, num_ids: int
    ) -> tuple[Array, Array]:
        results = self.device.empty(experts.shape, np.int32), self.device.empty((num_ids,), np.int32)
        given, sizes = (
            (rows, experts, self.upload(physical_ids), out),
            (len(out), experts.shape[1], num_ids, out.shape[1]),
        )
        self._launches.by_segment("packing", "pack_choices", out, *given, *results, *sizes)
        return results

    def take_rows(self, rows: Array, index: IntArray) -> Array:
        out = self._launches.rows((len(index), *rows.shape[1:]))
        self.pack(rows, index, out)
        return out

    def pack(self, rows: Array, index: Array | None, out: Array) -> None:
        on_device = index if index is None or self.device.holds(index) else self.upload(index)
        given, width = (rows, on_device, out), prod(out.shape[1:])
        if self.device.holds(rows) and self.device.holds(out):
            self._launches.by_segment("packing", "take_rows", out, *given, width)
        else:
            self._launches.over_bus("packing", "take_rows_over_bus", out, *given, len(out), width)

    def unpack(self, buffer: Array, index: Array | None) -> Array:
        """Rows in device memory that keep their order stay in the buffer."""
        if index is None and self.device.holds(buffer):
            return buffer
        out = self._launches.rows((len(buffer) if index is None else len(index), *buffer.shape[1:]))
        self.pack(buffer, index, out)
        return out

    def join(self, parts: Sequence[Array]) -> Array:
        out, first = self.device.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype), 0
        for part in parts:
            self.device.copy(part, out[first : first + len(part)])
            first += len(part)
        return out

    def combine(self, buffer: Array, output_rows: Array, weights: Array, addends: Sequence[Array] = ()) -> Array:
        out = self._launches.rows((len(output_rows), buffer.shape[1]))
        given = (buffer, output_rows, weights, *_both(addends))
        sizes = (output_rows.shape[1], buffer.shape[1])
        grid = (len(out), -(-buffer.shape[1] // COMBINED_NUMBERS), 1)
        self._launches.launch("packing", "combine", grid, 128, *given, out, *sizes)
        return out

    def combine_rms_norm(
        self, buffer: Array, output_rows: Array, weights: Array, addends: Sequence[Array], norm: RmsNorm
    ) -> tuple[Array, Array]:
        shape = (len(output_rows), buffer.shape[1])
        total, out = self._launches.rows(shape), self._launches.rows(shape)
        given = (buffer, output_rows, weights, *_both(addends), norm.weight, total, out)
        sizes = (output_rows.shape[1], buffer.shape[1], norm.eps, norm.rounded)
        self._launches.by_norm("combine_rms_norm", out, *given, *sizes, weight=norm.weight)
        return total, out

    def expert_mlp(
        self, rows: Array, experts: Sequence[Expert], counts: IntArray, *, out: Array | None = None
    ) -> Array:
        outputs, few = self._launches.rows(rows.shape) if out is None else out, []
        for own in expert_rows(experts, counts.tolist()):
            if self._few_rows.takes(own):
                few.append(own)
            else:
                self._expert_of_many(rows, own, outputs)
        self._few_rows.expert_mlps(rows, few, outputs)
        return outputs

    def _expert_of_many(self, rows: Array, own: ExpertRows, outputs: Array) -> None:
        x, out = (rows_from(whole, own.first, own.num_rows) for whole in (rows, outputs))
        expert = own.expert
        hidden = self.linear(x, expert.gate_up, expert.gate_up_bias)
        hidden = self.swiglu(hidden, expert.clamp) if expert.gated else self.squared_relu(hidden)
        self._products.biased(hidden, expert.down, expert.down_bias, out)

    # Parts of a layer

    def fuse_attention(self, block: AttentionBlock) -> FusedAttention | None:
        """As CUDA graphs, if the backend captures them."""
        if not self._capture:
            return None
        return CapturedAttention(
            block, self, self._attention, self._launches, memories=self._graph_memories, lay_out=self._attention_layout
        )

    def fuse_experts(self, block: ExpertsBlock) -> FusedExperts | None:
        """There is none."""

    def fuse_layers(self, layers: Sequence[tuple[FusedAttention, FusedExperts]]) -> FusedLayers | None:
        """There is none."""

    # Tokens

    def logits(self, x: Array, head: Matrix, bias: Array | None = None) -> Array:
        return self._products.in_float(x, head, bias)

    def sample(self, logits: Array, requests: SamplingRequests, *, top: int) -> SampledTokens:
        """The device finds the most likely token; the host applies the other sampling rules."""
        targets = np.full(len(requests), -1)
        for row in np.flatnonzero(~take_likeliest(requests)).tolist():
            targets[row] = sample_tokens(self.download(logits[row])[None], requests[row : row + 1])[0]
        return self.score(logits, targets, top=top)

    def score(self, logits: Array, targets: IntArray, *, top: int) -> SampledTokens:
        """A negative target means the most likely token."""
        rows, vocabulary = logits.shape
        tokens, logprobs = self.device.empty((rows,), np.int32), self.device.empty((rows,), np.float32)
        top = min(top, vocabulary)
        top_tokens = self.device.empty((rows, top), np.int32)
        top_logprobs = self.device.empty((rows, top), np.float32)
        found = (tokens, logprobs, top_tokens, top_logprobs)
        given = (logits, self.upload(targets), *found)
        self._launches.launch("tokens", "score", (rows, 1, 1), 1024, *given, vocabulary, top)
        return SampledTokens(*self._download(*found))

    def take_outputs(self, matrix: Matrix, outputs: range) -> Matrix:
        return Matrix(rows_from(matrix.values, outputs.start, len(outputs)), matrix.transposed)

    def scan(self, logits: Array, targets: IntArray, *, first: int, top: int) -> LogitScan:
        (rows, width), top = logits.shape, min(top, logits.shape[1])
        blocks = -(-width // SUM_TOKENS)
        highest, sums, target_logits, top_logits = (
            self.device.empty(shape, np.float32) for shape in ((rows, blocks), (rows, blocks), (rows,), (rows, top))
        )
        top_tokens = self.device.empty((rows, top), np.int32)
        given = (logits, highest, sums, width, SUM_TOKENS)
        self._launches.launch("tokens", "sum_exponentials", (rows, blocks, 1), 256, *given)
        places = self.upload(np.clip(targets - first, 0, width - 1))
        found = (target_logits, top_tokens, top_logits)
        self._launches.launch("tokens", "likeliest", (rows, 1, 1), 1024, logits, places, *found, width, top)
        return LogitScan(*self._download(highest, sums, *found))

    def tokens_above(self, logits: Array, least: Float32Array) -> tuple[IntArray, IntArray, Float32Array]:
        """The first kernel counts, so that the second writes what is downloaded, and no more."""
        (rows, width), grid = logits.shape, (len(logits), 1, 1)
        limits, counts = self.upload(least), self.device.empty((rows,), np.int32)
        self._launches.launch("tokens", "count_above", grid, 1024, logits, limits, counts, width)
        in_row = self.download(counts)
        ends = np.cumsum(in_row)
        found = [self.device.empty((int(in_row.sum()),), kind) for kind in (np.int32, np.float32)]
        if len(found[0]):
            given = (logits, limits, self.upload(ends - in_row), *found, width)
            self._launches.launch("tokens", "take_above", grid, 1024, *given)
        columns, values = self._download(*found)
        return np.repeat(np.arange(rows), in_row), columns, values


def _both(addends: Sequence[Array]) -> tuple[Array | None, ...]:
    """At most two addends as two arguments of a kernel."""
    return (*addends, *[None] * (2 - len(addends)))


def _weighing(router: Router) -> tuple[bool, float, float]:
    return router.renormalize, router.least_sum, router.scaling


def _rounding(router: Router) -> tuple[bool, bool]:
    """Whether logits and weights are rounded to the precision of rows, which changes no float32."""
    return not router.float32_logits, not router.float32_weights
