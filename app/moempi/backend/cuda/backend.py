"""The GPU backend: CUDA kernels on a `Device`, and matrix products by the device's library.

Rows, weights and the cache are bfloat16 bits, or float32 throughout. Every verb but `download`, `group`, `sample` and
`score` returns when its work is submitted; while these four wait, they call `progress`, so that the transfers of all
lanes advance. `finish_loading` and the upload of a large array block without it. Matrices stay as they are stored. The
bits of a product depend on the number of rows of the call. `reproducible` therefore makes only calls of PRODUCT_ROWS
rows, and attends row by row.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, IntArray
from moempi.backend.cuda.attention_layout import AttentionLayout, head_dims, is_latent, lay_out_rows, tile_kernel
from moempi.backend.cuda.device import Argument, Device, Grid, find_kernel
from moempi.backend.protocol import (
    Array,
    Cache,
    Event,
    Expert,
    SampledTokens,
    SamplingRequest,
    Segment,
    Stored,
)
from moempi.backend.sampling import sample_token
from moempi.config.architecture import Clamp, Router
from moempi.config.tensors import PAGE_ROWS
from moempi.errors import ConfigError

PRODUCT_ROWS = 64
SEGMENT_BYTES = 8192
"""Bytes of a row per block of the kernels that copy rows; equals SEGMENT_BYTES of kernels/rows.cuh."""
FLAT_NUMBERS = 2048
"""Numbers per block of a flat kernel."""
ROTATED_NUMBERS = 2048
"""Numbers of a row per block of `rotate`."""
COMBINED_NUMBERS = 1024
"""Numbers of a row per block of `combine`."""
SPLIT_KEYS = 256
"""Keys per block of kernels/attention.cu."""
MOST_BLOCKS = 65_535
"""Blocks of a grid along its second or third axis."""
PARTIAL_BYTES = 64 << 20
"""Memory for the partial results of kernels/attention.cu; more rows are attended in several launches."""
SPLIT_HEADS = 4
"""Query heads that share a key-value head and a block of kernels/attention.cu."""
GROUPED_CHOICES = 8
"""Choices per thread of kernels/grouping.cu; more than a block's are sorted by several blocks."""
MOST_IDS = 8192
"""Physical experts of a layer that kernels/grouping.cu sorts by."""
ROUTER_ROWS = 4
"""Rows per block of kernels/router.cu."""
SCORING = {"softmax": 0, "sigmoid": 1, "softmax_chosen": 2}


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix as stored: (outputs, inputs), or (inputs, outputs) when `transposed`."""

    values: Array
    transposed: bool

    @property
    def outputs(self) -> int:
        """Width of a product with the matrix."""
        return int(self.values.shape[1 if self.transposed else 0])


class CudaBackend:
    """The verbs of `protocol.Backend` on a GPU."""

    name = "cupy"

    def __init__(
        self, device: Device, *, precision: str, reproducible: bool, progress: Callable[[], None] = lambda: None
    ) -> None:
        self.device = device
        self.memory_id = device.memory_id
        self.comm_buffers_on_host = device.comm_buffers_on_host
        self.is_bfloat16 = precision == "bfloat16"
        self.reproducible = reproducible or not self.is_bfloat16
        self.row_dtype = np.dtype(np.uint16 if self.is_bfloat16 else np.float32)
        self._constants: tuple[tuple[str, int | None], ...] = () if self.is_bfloat16 else (("FLOAT32_ROWS", None),)
        self._progress = progress
        self._queue = 0
        self._layouts: dict[int, AttentionLayout] = {}
        self._frequencies: dict[tuple[int, bytes], Array] = {}

    # Memory

    def available_bytes(self) -> int:
        return self.device.available_bytes()

    def tensor(self, *stored: Stored) -> Array:
        """Stored float32 values stay float32."""
        whole = self.device.upload(stored[0] if len(stored) == 1 else np.concatenate(stored))
        return whole if self.is_bfloat16 or whole.dtype == np.float32 else self._widened(whole)

    def matrix(self, *stored: Stored, transposed: bool = False) -> Matrix:
        whole = stored[0] if len(stored) == 1 else np.concatenate(stored, axis=1 if transposed else 0)
        return Matrix(self.tensor(whole), transposed)

    def cache(self, pages: int, kv_heads: int, head_dim: int, *, latent: int = 0) -> Cache:
        shape = (pages * PAGE_ROWS, kv_heads, head_dim)
        keys = self._rows(shape)
        cache = Cache(keys=keys, values=keys[..., :latent] if latent else self._rows(shape))
        self.clear(cache, np.arange(pages))
        return cache

    def clear(self, cache: Cache, pages: IntArray) -> None:
        numbers = PAGE_ROWS * prod(cache.keys.shape[1:])
        index = self.upload(pages)
        for held in (cache.keys,) if is_latent(cache) else (cache.keys, cache.values):
            self._launch("kv_cache", "clear_pages", (len(pages), 1, 1), 1024, held, index, numbers)

    @property
    def queue(self) -> int:
        return self._queue

    @contextmanager
    def on_queue(self, number: int) -> Iterator[None]:
        before = self._queue
        self._use_queue(number)
        try:
            yield
        finally:
            self._use_queue(before)

    def _use_queue(self, number: int) -> None:
        self._queue = number
        self.device.use_queue(number)

    def record_event(self) -> Event:
        return self.device.record_event()

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        self.device.register_host_memory(memory)

    def comm_buffer(self, rows: int, width: int) -> Array:
        return self.device.comm_buffer((rows, width), self.row_dtype)

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
        on_host = [self.device.start_download(values) for values in arrays]
        event = self.device.record_event()
        while not event.is_done():
            self._progress()
            os.sched_yield()
        return [values.copy() for values in on_host]

    def finish_loading(self) -> None:
        self.device.record_event().synchronize()
        self.device.free_unused()

    # Rows

    def embed(self, tokens: IntArray, table: Array) -> Array:
        return self.take_rows(table, tokens)

    def rms_norm(self, x: Array, weight: Array, *, eps: float, rounded: bool = True) -> Array:
        out = self._rows(x.shape)
        sizes = (*_extents(x), eps, rounded)
        width = x.shape[-1]
        grid = (prod(x.shape) // width, 1, 1)
        self._launch("norm", "rms_norm", grid, min(512, _threads(-(-width // 4))), x, weight, out, *sizes)
        return out

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        out = self._rows(x.shape)
        self._by_vector("norm", "layer_norm", out, x, weight, bias, out, *_extents(x), eps)
        return out

    def linear(self, x: Array, matrix: Matrix, bias: Array | None = None) -> Array:
        out = self._rows((len(x), matrix.outputs))
        self._biased_product(x, matrix, bias, out)
        return out

    def linear_heads(self, x: Array, matrices: Array) -> Array:
        out = self._rows((*x.shape[:2], matrices.shape[-1]))
        for rows, whole in self._calls(len(x)):
            if whole:
                self.device.products(x[rows], matrices, out[rows])
            else:
                padded, result = self._padded(x[rows]), self._rows((PRODUCT_ROWS, *out.shape[1:]))
                self.device.products(padded, matrices, result)
                self._copy(result[: rows.stop - rows.start], out[rows])
        return out

    def clip(self, x: Array, limit: float) -> Array:
        out = self._rows(x.shape)
        self._by_vector("elementwise", "clip", out, x, out, *_extents(x), limit)
        return out

    def join_columns(self, *parts: Array) -> Array:
        width = sum(part.shape[-1] for part in parts)
        out, first = self._rows((*parts[0].shape[:-1], width)), 0
        for part in parts:
            sizes = (*_extents(part), first, width)
            self._by_vector("elementwise", "copy_columns", out, part, out, *sizes)
            first += part.shape[-1]
        return out

    def add(self, x: Array, y: Array) -> Array:
        out = self._rows(x.shape)
        self._flat("add", prod(out.shape), x, y, out)
        return out

    def swiglu(self, gate_up: Array, clamp: Clamp | None = None) -> Array:
        hidden = gate_up.shape[1] // 2
        out = self._rows((len(gate_up), hidden))
        alpha, limit = (clamp.alpha, clamp.limit) if clamp else (0.0, 0.0)
        rule = (hidden, alpha, limit)
        self._by_vector("elementwise", "swiglu", out, gate_up, out, *rule)
        return out

    def scale_by_sigmoid(self, x: Array, logits: Array) -> Array:
        out = self._rows(x.shape)
        self._by_vector("elementwise", "scale_by_sigmoid", out, x, logits, out, x.shape[1])
        return out

    # Attention

    def rope_angles(self, positions: IntArray, *, frequencies: Float32Array, amplitude: float) -> tuple[Array, Array]:
        shape = (len(positions), len(frequencies))
        cosines, sines = self.device.empty(shape, np.float32), self.device.empty(shape, np.float32)
        sizes = (shape[0], shape[1], amplitude)
        given = (self.upload(positions), self._uploaded_frequencies(frequencies))
        self._launch("rope", "rope_angles", (-(-prod(shape) // 256), 1, 1), 256, *given, cosines, sines, *sizes)
        return cosines, sines

    def _uploaded_frequencies(self, frequencies: Float32Array) -> Array:
        """The frequencies of a model, which each step needs; uploaded once for each queue, whose work is in order."""
        key = (self.queue, frequencies.tobytes())
        if key not in self._frequencies:
            self._frequencies[key] = self.upload(frequencies)
        return self._frequencies[key]

    def rotate(self, x: Array, angles: tuple[Array, Array], *, interleaved: bool = False) -> Array:
        out = self._rows(x.shape)
        heads, dim, *strides = _extents(x)
        sizes = (heads, dim, angles[0].shape[1], *strides, interleaved)
        grid = (len(x), -(-prod(x.shape[1:]) // ROTATED_NUMBERS), 1)
        self._launch("rope", "rotate", grid, 128, x, *angles, out, *sizes)
        return out

    def extend_cache(self, cache: Cache, keys: Array, values: Array | None, segments: Sequence[Segment]) -> None:
        layout = self._attention_layout(cache, segments)
        for new, held in ((keys, cache.keys), (values, cache.values)):
            if new is not None:
                given = (new, held, layout.spans, layout.pages)
                self._by_segment("kv_cache", "extend_cache", new, *given, *_extents(new))

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
        out = self._rows((*queries.shape[:2], cache.values.shape[-1]))
        layout = self._attention_layout(cache, segments)
        kv_heads = cache.keys.shape[1]
        if len(layout.tiles):
            kernel = layout.tile_kernel
            assert kernel is not None
            given = (queries, cache.keys, cache.values, sinks, layout.tiles, layout.pages, out)
            rule = (kv_heads, scale, window)
            self.device.launch(
                find_kernel(f"{kernel.file}.cu", "attend_tiles", tuple(head_dims(cache).items())),
                (len(layout.tiles), out.shape[1], 1),
                kernel.threads,
                (*given, *rule),
                shared_bytes=kernel.shared_bytes(cache),
            )
        self._attend_rows(queries, cache, layout, out, scale=scale, window=window, sinks=sinks)
        return out

    def _attend_rows(
        self,
        queries: Array,
        cache: Cache,
        layout: AttentionLayout,
        out: Array,
        *,
        scale: float,
        window: int,
        sinks: Array | None,
    ) -> None:
        """Attend the single rows in blocks of keys, as many rows per launch as PARTIAL_BYTES holds."""
        _, heads, value_dim = out.shape
        kv_heads = cache.keys.shape[1]
        together = min(SPLIT_HEADS, heads // kv_heads)
        head_rounds = kv_heads * -(-(heads // kv_heads) // together)
        value_stride = cache.keys.shape[-1] if is_latent(cache) else value_dim
        dims = {**head_dims(cache), "HEADS": together}
        rule = (heads, kv_heads, value_stride, scale, window)
        for run in layout.single_rows:
            rows, splits = run.rows, -(-run.most_keys // SPLIT_KEYS)
            partial_bytes = heads * splits * value_dim * 4 if splits > 1 else 0
            step = max(1, min(MOST_BLOCKS, PARTIAL_BYTES // max(1, partial_bytes)))
            for first in range(rows.start, rows.stop, step):
                num_rows = min(step, rows.stop - first)
                own, spans, attended = (_rows_from(x, first, num_rows) for x in (queries, layout.spans, out))
                sums = stats = None
                if splits > 1:
                    sums = self.device.empty((num_rows, heads, splits, value_dim), np.float32)
                    stats = self.device.empty((num_rows, heads, splits, 2), np.float32)
                given = (own, cache.keys, cache.values, sinks, spans, layout.pages)
                results = (sums, stats, attended)
                grid = (head_rounds, splits, num_rows)
                self._launch("attention", "attend_rows", grid, 128, *given, *results, *rule, **dims)
                if splits > 1:
                    merged = (sums, stats, sinks, attended, splits)
                    self._launch("attention", "merge_splits", (num_rows, heads, 1), 128, *merged, **dims)

    def _attention_layout(self, cache: Cache, segments: Sequence[Segment]) -> AttentionLayout:
        """The layout of a step's rows is the same in all layers, so it is kept until the queue's next step."""
        layout = self._layouts.get(self.queue)
        if layout is None or layout.segments is not segments:
            kernel = None if self.reproducible else tile_kernel(cache, has_warpgroups=self.device.has_warpgroups)
            layout = self._layouts[self.queue] = lay_out_rows(segments, tile_kernel=kernel, upload=self.upload)
        return layout

    # Experts

    def router_logits(self, x: Array, matrix: Matrix, router: Router, *, bias: Array | None = None) -> Array:
        logits = self._float_product(x, matrix, bias)
        if not router.float32_logits and self.is_bfloat16:
            self._flat("round_floats", prod(logits.shape), logits)
        return logits

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
        rounds = self.is_bfloat16 and not router.float32_weights
        if router.scoring == "sparsemixer":
            rule: tuple[Argument, ...] = (rows, router.jitter, rounds)
            self._by_router("choose_sparsemixer", num_experts, logits, experts, weights, *rule)
            return experts, weights
        bias = None if selection_bias is None else self.upload(selection_bias)
        groups = (router.num_groups, router.kept_groups, 2 if router.group_score == "top2" else 1)
        rule = (rows, router.top_k, SCORING[router.scoring], *groups)
        given = (logits, correction, bias, experts, weights)
        self._by_router("choose_experts", num_experts, *given, *rule, *_weighing(router), rounds)
        return experts, weights

    def pick_replicas(self, experts: Array, period: int) -> Array:
        out = self.device.empty(experts.shape, np.int32)
        count, sizes = prod(out.shape), (prod(out.shape), out.shape[1], period)
        self._launch("grouping", "pick_replicas", (-(-count // 256), 1, 1), 256, experts, out, *sizes, IDS=64)
        return out

    def weigh_experts(self, logits: Array, experts: Array, router: Router) -> Array:
        weights = self.device.empty(experts.shape, np.float32)
        rule = (len(experts), experts.shape[1], SCORING[router.scoring])
        rounds = self.is_bfloat16 and not router.float32_weights
        given = (logits, experts, weights)
        self._by_router("weigh_experts", logits.shape[1], *given, *rule, *_weighing(router), rounds)
        return weights

    def group(self, experts: Array, physical_ids: Array, *, num_ids: int) -> tuple[Array, Array, IntArray]:
        choices, slots = prod(experts.shape), experts.shape[1]
        if not choices:
            return self.upload(np.zeros(0, np.int32)), experts, np.zeros(num_ids, np.int64)
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
            self._launch("grouping", "count_choices", (blocks, 1, 1), threads, *counted, IDS=ids)
            scan_threads = 32 * -(-blocks // 32)
            scanned = (before, counts, blocks)
            self._launch("grouping", "scan_blocks", (num_ids, 1, 1), scan_threads, *scanned, IDS=ids)
        results, sizes = (source_rows, output_rows, counts), (choices, slots, num_ids)
        self._launch("grouping", "group", (blocks, 1, 1), threads, *given, before, *results, *sizes, IDS=ids)
        return source_rows, output_rows, self.download(counts).astype(np.int64)

    def take_rows(self, rows: Array, index: IntArray) -> Array:
        out = self._rows((len(index), *rows.shape[1:]))
        self.pack(rows, index, out)
        return out

    def pack(self, rows: Array, index: Array | None, out: Array) -> None:
        on_device = index if index is None or self.device.holds(index) else self.upload(index)
        self._by_segment("packing", "take_rows", out, rows, on_device, out, prod(out.shape[1:]))

    def unpack(self, buffer: Array, index: Array | None) -> Array:
        out = self._rows((len(buffer) if index is None else len(index), *buffer.shape[1:]))
        self.pack(buffer, index, out)
        return out

    def join(self, parts: Sequence[Array]) -> Array:
        out, first = self._rows((sum(map(len, parts)), *parts[0].shape[1:])), 0
        for part in parts:
            self.device.copy(part, out[first : first + len(part)])
            first += len(part)
        return out

    def combine(self, buffer: Array, output_rows: Array, weights: Array) -> Array:
        out = self._rows((len(output_rows), buffer.shape[1]))
        sizes = (output_rows.shape[1], buffer.shape[1])
        grid = (len(out), -(-buffer.shape[1] // COMBINED_NUMBERS), 1)
        self._launch("packing", "combine", grid, 128, buffer, output_rows, weights, out, *sizes)
        return out

    def expert_mlp(self, rows: Array, experts: Sequence[Expert], counts: IntArray) -> Array:
        outputs, first = self._rows(rows.shape), 0
        for expert, count in zip(experts, counts.tolist(), strict=True):
            if count:
                own, out = (_rows_from(whole, first, count) for whole in (rows, outputs))
                hidden = self.swiglu(self.linear(own, expert.gate_up, expert.gate_up_bias), expert.clamp)
                self._biased_product(hidden, expert.down, expert.down_bias, out)
                first += count
        return outputs

    # Tokens

    def logits(self, x: Array, head: Matrix, bias: Array | None = None) -> Array:
        return self._float_product(x, head, bias)

    def sample(self, logits: Array, requests: Sequence[SamplingRequest], *, top: int) -> SampledTokens:
        """The device finds the most likely token; the host applies the other sampling rules."""
        targets = np.full(len(requests), -1)
        for row, request in enumerate(requests):
            if request.sampling.temperature or request.sampling.repetition_penalty != 1.0:
                targets[row] = sample_token(self.download(logits[row]), request)
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
        self._launch("tokens", "score", (rows, 1, 1), 1024, *given, vocabulary, top)
        return SampledTokens(*self._download(*found))

    # Products

    def _biased_product(self, x: Array, matrix: Matrix, bias: Array | None, out: Array) -> None:
        """Compute out (T, N) = x (T, K) times the matrix, plus the bias, rounded once.

        cuBLAS does not add the bias: it would round the product before.
        """
        if bias is None:
            self._product(x, matrix, out)
        else:
            product = self._float_product(x, matrix, None)
            self._by_vector("elementwise", "round_biased", out, product, bias, out, matrix.outputs)

    def _product(self, x: Array, matrix: Matrix, out: Array) -> None:
        """Compute out (T, N) = x (T, K) times the matrix."""
        if x.dtype != matrix.values.dtype:
            x = self._widened(x)
        if not self.reproducible:
            if len(x):
                self.device.product(x, matrix.values, out, transposed=matrix.transposed)
            return
        for rows, whole in self._calls(len(x)):
            if whole:
                self.device.product(x[rows], matrix.values, out[rows], transposed=matrix.transposed)
            else:
                padded, result = self._padded(x[rows]), self.device.empty((PRODUCT_ROWS, *out.shape[1:]), out.dtype)
                self.device.product(padded, matrix.values, result, transposed=matrix.transposed)
                self._copy(result[: rows.stop - rows.start], out[rows])

    def _calls(self, num_rows: int) -> list[tuple[slice, bool]]:
        """The rows of each call of a product, and whether the call has the right number without padding."""
        if not self.reproducible:
            return [(slice(0, num_rows), True)] if num_rows else []
        firsts = range(0, num_rows, PRODUCT_ROWS)
        rows = [slice(first, min(first + PRODUCT_ROWS, num_rows)) for first in firsts]
        return [(some, some.stop - some.start == PRODUCT_ROWS) for some in rows]

    def _float_product(self, x: Array, matrix: Matrix, bias: Array | None) -> Array:
        """The product in float32, plus the bias."""
        out = self.device.empty((len(x), matrix.outputs), np.float32)
        self._product(x, matrix, out)
        if bias is not None:
            self._by_vector("elementwise", "add_bias", out, out, bias, matrix.outputs)
        return out

    def _padded(self, x: Array) -> Array:
        padded = self.device.empty((PRODUCT_ROWS, *x.shape[1:]), x.dtype)
        self._copy(x, padded[: len(x)])
        return padded

    def _copy(self, x: Array, out: Array) -> None:
        """Copy rows of 2 or 4 bytes a number, which may be strided, to contiguous memory, as 2-byte halves."""
        halves = x.itemsize // 2
        heads, width, *strides = (int(size) for size in _extents(x))
        sizes = (heads, width * halves, *(stride * halves for stride in strides))
        kernel = find_kernel("elementwise.cu", "copy_columns")
        if len(x):
            end = (0, width * halves)
            self.device.launch(kernel, (len(x) * heads, 1, 1), _threads(width * halves), (x, out, *sizes, *end))

    # Launches

    def _rows(self, shape: tuple[int, ...]) -> Array:
        return self.device.empty(shape, self.row_dtype)

    def _widened(self, rows: Array) -> Array:
        out = self.device.empty(rows.shape, np.float32)
        self._flat("widen_rows", prod(out.shape), rows, out)
        return out

    def _by_router(self, name: str, num_experts: int, *arguments: Argument) -> None:
        rows = len(arguments[0])  # type: ignore[arg-type]
        self._launch("router", name, (-(-rows // ROUTER_ROWS), 1, 1), 128, *arguments, EXPERTS=num_experts)

    def _by_vector(self, file: str, name: str, out: Array, *arguments: Argument) -> None:
        """Launch one block per vector of `out`."""
        width = out.shape[-1]
        self._launch(file, name, (prod(out.shape) // width, 1, 1), _threads(width), *arguments)

    def _by_segment(self, file: str, name: str, out: Array, *arguments: Argument) -> None:
        """Launch one block per SEGMENT_BYTES of each row of `out`."""
        row_bytes = prod(out.shape[1:]) * out.itemsize
        self._launch(file, name, (len(out), -(-row_bytes // SEGMENT_BYTES), 1), 128, *arguments)

    def _flat(self, name: str, count: int, *arguments: Argument) -> None:
        """Launch one thread per eight of `count` numbers; `count` is the kernel's last argument."""
        self._launch("elementwise", name, (-(-count // FLAT_NUMBERS), 1, 1), 256, *arguments, count)

    def _launch(self, file: str, name: str, grid: Grid, threads: int, *arguments: Argument, **constants: int) -> None:
        if all(grid):
            kernel = find_kernel(f"{file}.cu", name, (*self._constants, *constants.items()))
            self.device.launch(kernel, grid, threads, arguments)


def _rows_from(whole: Array, first: int, count: int) -> Array:
    """Rows [first, first + count); a view takes the host longer than the comparison."""
    return whole if count == len(whole) else whole[first : first + count]


def _threads(width: int) -> int:
    """Threads of a block for `width` numbers, eight per thread: whole warps, at most 1,024."""
    return int(min(1024, 32 * -(-width // 256)))


def _extents(x: Array) -> tuple[int, int, int, int]:
    """Heads, width, row stride and head stride, in numbers, of (T, D) or (T, H, D)."""
    heads = x.shape[1] if x.ndim == 3 else 1
    head_stride = x.strides[1] // x.itemsize if x.ndim == 3 else 0
    return heads, x.shape[-1], x.strides[0] // x.itemsize, head_stride


def _weighing(router: Router) -> tuple[bool, float, float]:
    return router.renormalize, router.least_sum, router.scaling
