"""The GPU backend: CUDA kernels on a `Device`, and matrix products by the device's library.

Rows, weights and the cache are bfloat16 bits, or float32 throughout. Every verb but `download`, `sample`, `score` and
`scan` returns when its work is submitted; while these wait, they call `progress`, so that the transfers of all lanes
advance. `finish_loading` and the upload of a large array block without it. Matrices stay as they are stored. With
`reproducible`, each row's bits are independent of the other rows: products.py makes calls of one size, few_rows.py
computes experts in parts of few rows where it can, and attention goes row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, IntArray
from moempi.backend.cuda.attention import PagedAttention, Queries, Rule
from moempi.backend.cuda.attention_layout import StepLayouts, is_latent
from moempi.backend.cuda.captured_attention import CapturedAttention, GraphMemory
from moempi.backend.cuda.delta_rule import StateVerbs
from moempi.backend.cuda.device import Device
from moempi.backend.cuda.experts import ExpertMlps
from moempi.backend.cuda.host_copies import HostCopies
from moempi.backend.cuda.launches import Launches, rows_from
from moempi.backend.cuda.packing import MOST_CHOICES, Packing
from moempi.backend.cuda.peer_memory import DevicePeerMemory
from moempi.backend.cuda.products import Matrix, Products
from moempi.backend.cuda.rope import Rope
from moempi.backend.cuda.router import choose_experts, weigh_experts
from moempi.backend.cuda.rows import RowVerbs
from moempi.backend.cuda.selection import Selection
from moempi.backend.cuda.tokens import TokenVerbs
from moempi.backend.protocol import Attend, Download, Event, FusedAttention, FusedExperts, FusedLayers
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
)
from moempi.config.architecture import Clamp, DeltaRule, Router, StateSpace
from moempi.config.tensors import PAGE_ROWS

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
        self._copies = HostCopies(device, progress)
        self._launches = launches = Launches(device, row_dtype=self.row_dtype)
        self._products = Products(launches, reproducible=self.reproducible)
        self._rows = RowVerbs(launches, self._products)
        self._rope = Rope(launches, self._copies)
        self._attention = PagedAttention(launches)
        self._layouts = StepLayouts(device, self._copies.upload, tiled=not self.reproducible)
        self._selection = Selection(launches, self._attention)
        self._states = StateVerbs(launches, upload=self._copies.upload)
        self._packing = Packing(launches, self._copies)
        self._expert_mlps = ExpertMlps(launches, self._rows, self._products, reproducible=self.reproducible)
        self._tokens = TokenVerbs(launches, self._copies)
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
        return self._launches.rows((rows, width))

    def upload(self, values: Array) -> Array:
        """Integers become int32, floats float32. An array of the device is returned as it is."""
        return self._copies.upload(values)

    def download(self, values: Array) -> npt.NDArray[Any]:
        (on_host,) = self._copies.download(values)
        return on_host

    def start_download(self, *arrays: Array) -> Download:
        return self._copies.start_download(*arrays)

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
        return self._rows.rms_norm(x, weight, eps=eps, rounded=rounded)

    def add_rms_norm(
        self, x: Array, y: Array, weight: Array, *, eps: float, rounded: bool = True
    ) -> tuple[Array, Array]:
        return self._rows.add_rms_norm(x, y, weight, eps=eps, rounded=rounded)

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        return self._rows.layer_norm(x, weight, bias, eps=eps)

    def linear(self, x: Array, matrix: Matrix, bias: Array | None = None) -> Array:
        return self._rows.linear(x, matrix, bias)

    def linear_heads(self, x: Array, matrices: Array) -> Array:
        return self._rows.linear_heads(x, matrices)

    def clip(self, x: Array, limit: float) -> Array:
        return self._rows.clip(x, limit)

    def join_columns(self, *parts: Array) -> Array:
        return self._rows.join_columns(*parts)

    def add(self, x: Array, y: Array) -> Array:
        return self._rows.add(x, y)

    def swiglu(self, gate_up: Array, clamp: Clamp | None = None) -> Array:
        return self._rows.swiglu(gate_up, clamp)

    def squared_relu(self, x: Array) -> Array:
        return self._rows.squared_relu(x)

    def scale_by_sigmoid(self, x: Array, logits: Array) -> Array:
        return self._rows.scale_by_sigmoid(x, logits)

    # Attention

    def rope_angles(self, positions: IntArray, *, frequencies: Float32Array, amplitude: float) -> tuple[Array, Array]:
        return self._rope.angles(positions, frequencies=frequencies, amplitude=amplitude)

    def rotate(self, x: Array, angles: tuple[Array, Array], *, interleaved: bool = False) -> Array:
        return self._rope.rotate(x, angles, interleaved=interleaved)

    def extend_cache(self, cache: Cache, keys: Array, values: Array | None, segments: Sequence[Segment]) -> None:
        self._attention.extend_cache(cache, keys, values, self._layouts.of(cache, segments))

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
        layout = self._layouts.of(cache, segments)
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
        layout = self._layouts.of(cache, segments)
        return self._attention.extend_latent_cache(
            keys, angles, cache, layout, norm=norm, interleaved=interleaved, queries=queries
        )

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
        return self._attention.attend_latent(both, cache, self._layouts.of(cache, segments), rule)

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
        return self._attention.attend(queries, cache, self._layouts.of(cache, segments), rule)

    def select_positions(
        self, queries: Array, weights: Array, index: Cache, segments: Sequence[Segment], *, top_k: int
    ) -> Array:
        return self._selection.positions(queries, weights, index, self._layouts.of(index, segments), top_k=top_k)

    def attend_selected(
        self, queries: Array, cache: Cache, segments: Sequence[Segment], positions: Array, *, scale: float
    ) -> Array:
        layout = self._layouts.of(cache, segments)
        return self._selection.attend(queries, cache, layout, positions, Rule(scale, 0, None))

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
        bias = None if selection_bias is None else self.upload(selection_bias)
        return choose_experts(self._launches, logits, router, correction=correction, selection_bias=bias)

    def weigh_experts(self, logits: Array, experts: Array, router: Router) -> Array:
        return weigh_experts(self._launches, logits, experts, router)

    def pick_replicas(self, experts: Array, period: int) -> Array:
        return self._packing.pick_replicas(experts, period)

    def group(self, experts: Array, physical_ids: Array, *, num_ids: int) -> tuple[Array, Array, Array]:
        return self._packing.group(experts, physical_ids, num_ids=num_ids)

    def group_and_pack(
        self, rows: Array, experts: Array, physical_ids: Array, out: Array, *, num_ids: int
    ) -> tuple[Array, Array]:
        spans = self._layouts.placed_spans
        return self._packing.group_and_pack(rows, experts, physical_ids, out, num_ids=num_ids, spans=spans)

    def take_rows(self, rows: Array, index: IntArray) -> Array:
        return self._packing.take_rows(rows, index)

    def pack(self, rows: Array, index: Array | None, out: Array) -> None:
        self._packing.pack(rows, index, out)

    def unpack(self, buffer: Array, index: Array | None) -> Array:
        return self._packing.unpack(buffer, index)

    def join(self, parts: Sequence[Array]) -> Array:
        return self._packing.join(parts)

    def combine(self, buffer: Array, output_rows: Array, weights: Array, addends: Sequence[Array] = ()) -> Array:
        return self._packing.combine(buffer, output_rows, weights, addends)

    def combine_rms_norm(
        self, buffer: Array, output_rows: Array, weights: Array, addends: Sequence[Array], norm: RmsNorm
    ) -> tuple[Array, Array]:
        return self._packing.combine_rms_norm(buffer, output_rows, weights, addends, norm)

    def expert_mlp(
        self, rows: Array, experts: Sequence[Expert], counts: IntArray, *, out: Array | None = None
    ) -> Array:
        return self._expert_mlps.compute(rows, experts, counts, out)

    # Parts of a layer

    def fuse_attention(self, block: AttentionBlock) -> FusedAttention | None:
        """There is none."""

    def capture_attention(self, attend: Attend) -> FusedAttention | None:
        """As CUDA graphs, if the backend captures them."""
        if not self._capture:
            return None
        return CapturedAttention(attend, self._launches, self._layouts, memories=self._graph_memories)

    def fuse_experts(self, block: ExpertsBlock) -> FusedExperts | None:
        """There is none."""

    def fuse_layers(self, layers: Sequence[tuple[FusedAttention, FusedExperts]]) -> FusedLayers | None:
        """There is none."""

    # Tokens

    def logits(self, x: Array, head: Matrix, bias: Array | None = None) -> Array:
        return self._products.in_float(x, head, bias)

    def sample(self, logits: Array, requests: SamplingRequests, *, top: int) -> SampledTokens:
        return self._tokens.sample(logits, requests, top=top)

    def score(self, logits: Array, targets: IntArray, *, top: int) -> SampledTokens:
        return self._tokens.score(logits, targets, top=top)

    def take_outputs(self, matrix: Matrix, outputs: range) -> Matrix:
        return Matrix(rows_from(matrix.values, outputs.start, len(outputs)), matrix.transposed)

    def scan(self, logits: Array, targets: IntArray, *, first: int, top: int) -> LogitScan:
        return self._tokens.scan(logits, targets, first=first, top=top)

    def tokens_above(self, logits: Array, least: Float32Array) -> tuple[IntArray, IntArray, Float32Array]:
        return self._tokens.tokens_above(logits, least)
