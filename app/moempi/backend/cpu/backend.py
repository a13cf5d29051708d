"""The CPU backend in NumPy: what runs without a C compiler, and the twin of the compiled kernels in the tests.

Weights and the cache are widened to float32 in memory. With bfloat16, rows between verbs are float32 arrays of bfloat16
values. The bits of a BLAS product depend on the number of rows of the call, so products are calls of BLOCK rows, and
attention takes blocks of BLOCK positions and PAGE_ROWS keys: results are the same bits for any batching.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, IntArray, aligned_empty, round_to_bfloat16, widen
from moempi.backend.cpu.attention import AttentionRule, attend_positions, attend_segments
from moempi.backend.cpu.attention_layout import BLOCK, cache_rows
from moempi.backend.cpu.control_groups import available_bytes
from moempi.backend.cpu.delta_rule import apply_delta_rule, convolve, silu
from moempi.backend.cpu.router import choose, weights_of
from moempi.backend.cpu.selection import select_of_segments
from moempi.backend.cpu.state_space import alpha_and_steps, apply_state_space
from moempi.backend.protocol import Attend, Download, FusedAttention, FusedExperts, FusedLayers
from moempi.backend.sampling import MOST_SCORES, likeliest, sample_tokens
from moempi.backend.scores import SUM_TOKENS, logprobs_of, without_nan
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

PIECE_FLOPS, FEWEST_ROWS = 1e8, 32
"""Work of one piece of a product, between two calls of `progress`, and the fewest rows of a piece."""
CACHED_ROWS = 32
"""Rows that `combine` sums at a time, so that their sums stay in the processor's cache."""
ONE_QUEUE = nullcontext()


class NumpyBackend:
    """The verbs of `protocol.Backend` on host memory. Every verb is complete when it returns.

    Long verbs work in pieces and call `progress` between them, so that transfers advance.
    """

    name = "numpy"
    comm_buffers_on_host = True
    peer_memory = None
    memory_id = "host"
    most_packed_choices = 0
    widened = True

    def __init__(self, *, precision: str, progress: Callable[[], None] = lambda: None) -> None:
        self.is_bfloat16 = precision == "bfloat16"
        self.row_dtype = np.dtype(np.uint16 if self.is_bfloat16 else np.float32)
        self._progress = progress

    # Memory

    def available_bytes(self) -> int:
        """Memory that the system and the control groups of this process leave."""
        return available_bytes()

    def tensor(self, *stored: Stored) -> Float32Array:
        whole = stored[0] if len(stored) == 1 else np.concatenate(stored)
        return widen(whole) if whole.dtype == np.uint16 else whole

    def matrix(self, *stored: Stored, transposed: bool = False) -> Array:
        """Held as (inputs, outputs), the faster layout for few rows."""
        parts = [self.tensor(part) if transposed else self.tensor(part).T for part in stored]
        width = sum(part.shape[1] for part in parts)
        joined = aligned_empty((parts[0].shape[0], width), np.float32)
        return np.concatenate(parts, axis=1, out=joined)

    def head_matrices(self, stored: Stored) -> Array:
        return self.tensor(stored)

    def table(self, stored: Stored) -> Array:
        return self.tensor(stored)

    def finish_loading(self) -> None:
        """Tensors are loaded when `tensor` returns."""

    def cache(self, pages: int, kv_heads: int, head_dim: int, *, latent: int = 0) -> Cache:
        keys = np.zeros((pages * PAGE_ROWS, kv_heads, head_dim), np.float32)
        return Cache(keys=keys, values=keys[..., :latent] if latent else np.zeros(keys.shape, np.float32))

    def clear(self, cache: Cache, pages: IntArray) -> None:
        for held in (cache.keys, cache.values):
            held.reshape(-1, PAGE_ROWS, *held.shape[1:])[pages] = 0

    @property
    def queue(self) -> int:
        return 0

    def on_queue(self, number: int) -> AbstractContextManager[None]:
        """There is one queue."""
        return ONE_QUEUE

    def record_event(self) -> None:
        """Returns None: every verb is complete when it returns."""

    def register_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """All host memory is usable."""

    def unregister_host_memory(self, memory: npt.NDArray[np.uint8]) -> None:
        """All host memory is usable."""

    def comm_buffer(self, rows: int, width: int) -> npt.NDArray[Any]:
        return aligned_empty((rows, width), self.row_dtype)

    row_buffer = comm_buffer

    def rows_in(self, buffer: npt.NDArray[Any]) -> None:
        """There are none."""

    def upload(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values

    def download(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values

    def start_download(self, *arrays: npt.NDArray[Any]) -> Download:
        return Download(None, arrays)

    # Rows

    def embed(self, tokens: IntArray, table: Float32Array) -> Float32Array:
        return table[tokens]

    def rms_norm(self, x: Float32Array, weight: Float32Array, *, eps: float, rounded: bool = True) -> Float32Array:
        scale = np.square(x).mean(axis=-1, keepdims=True)
        scale += np.float32(eps)
        np.sqrt(scale, out=scale)
        normalized = self._stored(x / scale) if rounded else x / scale
        normalized *= weight
        return self._stored(normalized)

    def add_rms_norm(
        self, x: Float32Array, y: Float32Array, weight: Float32Array, *, eps: float, rounded: bool = True
    ) -> tuple[Float32Array, Float32Array]:
        total = self.add(x, y)
        return total, self.rms_norm(total, weight, eps=eps, rounded=rounded)

    def layer_norm(self, x: Float32Array, weight: Float32Array, bias: Float32Array, *, eps: float) -> Float32Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        centred /= np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(eps))
        centred *= weight
        centred += bias
        return self._stored(centred)

    def linear(self, x: Float32Array, matrix: Array, bias: Float32Array | None = None) -> Float32Array:
        product = self._product(x, matrix)
        if bias is not None:
            product += bias
        return self._stored(product)

    def linear_heads(self, x: Float32Array, matrices: Array) -> Float32Array:
        num_rows, heads, inputs = x.shape
        by_head = _in_blocks(x).reshape(-1, BLOCK, heads, inputs).transpose(0, 2, 1, 3)
        product = np.matmul(by_head, matrices).transpose(0, 2, 1, 3)
        return self._stored(product.reshape(-1, heads, matrices.shape[-1])[:num_rows])

    def clip(self, x: Float32Array, limit: float) -> Float32Array:
        return self._stored(np.clip(x, np.float32(-limit), np.float32(limit)))

    def join_columns(self, *parts: Float32Array) -> Float32Array:
        return np.concatenate(parts, axis=-1)

    def add(self, x: Float32Array, y: Float32Array) -> Float32Array:
        return self._stored(x + y)

    def swiglu(self, gate_up: Float32Array, clamp: Clamp | None = None) -> Float32Array:
        hidden = gate_up.shape[1] // 2
        gate, up = gate_up[:, :hidden], gate_up[:, hidden:]
        if clamp is None:
            activated = np.negative(gate)
        else:
            gate, up = np.minimum(gate, np.float32(clamp.limit)), self.clip(up, clamp.limit) + np.float32(1)
            activated = gate * np.float32(-clamp.alpha)
        with np.errstate(over="ignore"):
            np.exp(activated, out=activated)
        activated += 1
        np.divide(gate, activated, out=activated)
        activated *= up
        return self._stored(activated)

    def squared_relu(self, x: Float32Array) -> Float32Array:
        positive = np.maximum(x, np.float32(0))
        return self._stored(np.multiply(positive, positive, out=positive))

    def scale_by_sigmoid(self, x: Float32Array, logits: Float32Array) -> Float32Array:
        divisor: Float32Array = (1 + np.exp(-np.maximum(logits, -88).astype(np.float64))).astype(np.float32)
        return self._stored(x / divisor)

    # Attention

    def rope_angles(
        self, positions: IntArray, *, frequencies: Float32Array, amplitude: float
    ) -> tuple[Float32Array, Float32Array]:
        """Shaped (T, 1, n) to apply to every head; rounded from float64."""
        angles = (positions.astype(np.float32)[:, None, None] * frequencies).astype(np.float64)
        cosine, sine = (values.astype(np.float32) for values in (np.cos(angles), np.sin(angles)))
        return cosine * np.float32(amplitude), sine * np.float32(amplitude)

    def rotate(
        self, x: Float32Array, angles: tuple[Float32Array, Float32Array], *, interleaved: bool = False
    ) -> Float32Array:
        cosine, sine = angles
        pairs = cosine.shape[-1]
        first, second = slice(pairs), slice(pairs, 2 * pairs)
        if interleaved:
            first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
        rotated = np.empty(x.shape, np.float32)
        np.subtract(x[..., first] * cosine, x[..., second] * sine, out=rotated[..., first])
        np.add(x[..., second] * cosine, x[..., first] * sine, out=rotated[..., second])
        rotated[..., 2 * pairs :] = x[..., 2 * pairs :]
        return self._stored(rotated)

    def extend_cache(
        self, cache: Cache, keys: Float32Array, values: Float32Array | None, segments: Sequence[Segment]
    ) -> None:
        for segment in segments:
            rows = slice(segment.row, segment.row + segment.length)
            extended = cache_rows(segment.pages, segment.start, segment.start + segment.length)
            cache.keys[extended] = keys[rows]
            if values is not None:
                cache.values[extended] = values[rows]

    def rotate_into_cache(
        self,
        heads: tuple[Float32Array, Float32Array, Float32Array],
        angles: tuple[Float32Array, Float32Array],
        *,
        cache: Cache,
        segments: Sequence[Segment],
        interleaved: bool = False,
        norms: tuple[RmsNorm, RmsNorm] | None = None,
    ) -> Float32Array:
        queries, keys, values = heads
        if norms is not None:
            queries, keys = (
                self.rms_norm(part, norm.weight, eps=norm.eps, rounded=norm.rounded)
                for part, norm in zip((queries, keys), norms, strict=True)
            )
        self.extend_cache(cache, self.rotate(keys, angles, interleaved=interleaved), values, segments)
        return self.rotate(queries, angles, interleaved=interleaved)

    def extend_latent_cache(
        self,
        keys: tuple[Float32Array, Float32Array],
        angles: tuple[Float32Array, Float32Array],
        *,
        norm: RmsNorm,
        cache: Cache,
        segments: Sequence[Segment],
        interleaved: bool = False,
        queries: tuple[Float32Array, RmsNorm] | None = None,
    ) -> Float32Array | None:
        vectors = self.rms_norm(keys[0], norm.weight, eps=norm.eps)
        rotated = self.rotate(keys[1], angles, interleaved=interleaved)
        self.extend_cache(cache, self.join_columns(vectors, rotated), None, segments)
        return None if queries is None else self.rms_norm(queries[0], queries[1].weight, eps=queries[1].eps)

    def attend(
        self,
        queries: Float32Array,
        cache: Cache,
        segments: Sequence[Segment],
        *,
        scale: float,
        window: int = 0,
        sinks: Float32Array | None = None,
    ) -> Float32Array:
        """The softmax is in float32."""
        rule = AttentionRule(scale, window, sinks)
        return self._stored(attend_segments(queries, cache, segments, rule, progress=self._progress))

    def attend_latent(
        self,
        queries: tuple[Float32Array, Float32Array],
        angles: tuple[Float32Array, Float32Array],
        cache: Cache,
        segments: Sequence[Segment],
        *,
        scale: float,
        interleaved: bool = False,
    ) -> Float32Array:
        rotated = self.rotate(queries[1], angles, interleaved=interleaved)
        return self.attend(self.join_columns(queries[0], rotated), cache, segments, scale=scale)

    def select_positions(
        self,
        queries: Float32Array,
        weights: Float32Array,
        index: Cache,
        segments: Sequence[Segment],
        *,
        top_k: int,
    ) -> npt.NDArray[np.int32]:
        return select_of_segments(queries, weights, index, segments, top_k=top_k, progress=self._progress)

    def attend_selected(
        self,
        queries: Float32Array,
        cache: Cache,
        segments: Sequence[Segment],
        positions: npt.NDArray[np.int32],
        *,
        scale: float,
    ) -> Float32Array:
        """The softmax is in float32."""
        attended = attend_positions(queries, cache, segments, positions, scale=scale, progress=self._progress)
        return self._stored(attended)

    # States

    def layer_state(self, slots: int, rule: DeltaRule | StateSpace) -> LayerState:
        tail, memory = (slots, rule.taps - 1, rule.mixed_dim), (slots, *rule.memory_shape)
        return LayerState(np.zeros(tail, np.float32), np.zeros(memory, np.float32))

    def causal_conv(
        self,
        x: Float32Array,
        taps: Float32Array,
        state: LayerState,
        segments: Sequence[Segment],
        bias: Float32Array | None = None,
    ) -> Float32Array:
        return self._stored(convolve(x, taps, state.tail, segments, bias))

    def delta_rule(
        self,
        heads: tuple[Float32Array, Float32Array, Float32Array],
        rates: Float32Array,
        constants: DeltaRates,
        state: LayerState,
        segments: Sequence[Segment],
    ) -> Float32Array:
        read = apply_delta_rule(heads, rates, constants, state.memory, segments, progress=self._progress)
        return self._stored(read)

    def state_space(
        self,
        heads: tuple[Float32Array, Float32Array, Float32Array],
        steps: Float32Array,
        constants: StateConstants,
        state: LayerState,
        segments: Sequence[Segment],
        *,
        least_step: float,
    ) -> Float32Array:
        rates = alpha_and_steps(steps, constants, least_step=least_step)
        read = apply_state_space(heads, rates, constants.skip, state.memory, segments, progress=self._progress)
        return self._stored(read)

    def gated_norm(self, x: Float32Array, gate: Float32Array, norm: RmsNorm) -> Float32Array:
        scale = np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + np.float32(norm.eps))
        return self._stored(x / scale * norm.weight * silu(gate))

    # Experts

    def choose_experts(
        self,
        logits: Float32Array,
        router: Router,
        *,
        correction: Float32Array | None = None,
        selection_bias: Float32Array | None = None,
    ) -> tuple[IntArray, Float32Array]:
        if selection_bias is not None:
            correction = selection_bias if correction is None else correction + selection_bias
        experts, weights = choose(self._stored_logits(logits, router), router, correction)
        return experts, weights if router.float32_weights else self._stored(weights)

    def pick_replicas(self, experts: IntArray, period: int) -> IntArray:
        return experts * period + np.arange(len(experts), dtype=experts.dtype)[:, None] % period

    def weigh_experts(self, logits: Float32Array, experts: IntArray, router: Router) -> Float32Array:
        weights = weights_of(self._stored_logits(logits, router), experts, router)
        return weights if router.float32_weights else self._stored(weights)

    def group(self, experts: IntArray, physical_ids: IntArray, *, num_ids: int) -> tuple[IntArray, IntArray, IntArray]:
        chosen = physical_ids[experts.reshape(-1)]
        order = np.argsort(chosen, kind="stable")
        output_rows = np.empty_like(order)
        output_rows[order] = np.arange(len(order))
        return (
            order // experts.shape[1],
            output_rows.reshape(experts.shape),
            np.bincount(chosen, minlength=num_ids),
        )

    def group_and_pack(
        self,
        rows: Float32Array,
        experts: IntArray,
        physical_ids: IntArray,
        out: npt.NDArray[Any],
        *,
        num_ids: int,
    ) -> tuple[IntArray, IntArray]:
        source_rows, output_rows, counts = self.group(experts, physical_ids, num_ids=num_ids)
        self.pack(rows, source_rows, out)
        return output_rows, counts

    def take_rows(self, rows: Float32Array, index: IntArray) -> Float32Array:
        return rows[index]

    def pack(self, rows: Float32Array, index: IntArray | None, out: npt.NDArray[Any]) -> None:
        if not len(out):
            return
        sent = np.ascontiguousarray(rows).view(np.uint16)[:, 1::2] if self.is_bfloat16 else rows
        if index is None:
            np.copyto(out, sent)
        else:
            np.take(sent, index, axis=0, out=out, mode="clip")

    def unpack(self, buffer: npt.NDArray[Any], index: IntArray | None) -> Float32Array:
        rows = buffer if index is None else buffer[index]
        return widen(rows) if self.is_bfloat16 else rows

    def join(self, parts: Sequence[Float32Array]) -> Float32Array:
        return np.concatenate(parts)

    def combine(
        self,
        buffer: npt.NDArray[Any],
        output_rows: IntArray,
        weights: Float32Array,
        addends: Sequence[Float32Array] = (),
    ) -> Float32Array:
        total = np.zeros((output_rows.shape[0], buffer.shape[1]), np.float32)
        for first in range(0, len(total), CACHED_ROWS):
            block = slice(first, first + CACHED_ROWS)
            for slot in range(output_rows.shape[1]):
                rows = self.unpack(buffer, output_rows[block, slot])
                rows *= weights[block, slot, None]
                total[block] += rows
        return reduce(self.add, addends, self._stored(total))

    def combine_rms_norm(
        self,
        buffer: npt.NDArray[Any],
        output_rows: IntArray,
        weights: Float32Array,
        addends: Sequence[Float32Array],
        norm: RmsNorm,
    ) -> tuple[Float32Array, Float32Array]:
        total = self.combine(buffer, output_rows, weights, addends)
        return total, self.rms_norm(total, norm.weight, eps=norm.eps, rounded=norm.rounded)

    def expert_mlp(
        self, rows: Float32Array, experts: Sequence[Expert], counts: IntArray, *, out: Float32Array | None = None
    ) -> Float32Array:
        outputs = np.empty_like(rows) if out is None else out
        first = 0
        for expert, count in zip(experts, counts.tolist(), strict=True):
            if count:
                gate_up = self.linear(rows[first : first + count], expert.gate_up, expert.gate_up_bias)
                hidden = self._activated(gate_up, expert)
                outputs[first : first + count] = self.linear(hidden, expert.down, expert.down_bias)
                first += count
        return outputs

    def _activated(self, gate_up: Float32Array, expert: Expert) -> Float32Array:
        return self.swiglu(gate_up, expert.clamp) if expert.gated else self.squared_relu(gate_up)

    # Parts of a layer

    def fuse_attention(self, block: AttentionBlock) -> FusedAttention | None:
        """There is none."""

    def capture_attention(self, attend: Attend) -> FusedAttention | None:
        """There is none."""

    def fuse_experts(self, block: ExpertsBlock) -> FusedExperts | None:
        """There is none."""

    def fuse_layers(self, layers: Sequence[tuple[FusedAttention, FusedExperts]]) -> FusedLayers | None:
        """There is none."""

    # Tokens

    def logits(self, x: Float32Array, head: Array, bias: Float32Array | None = None) -> Float32Array:
        product = self._product(x, head)
        return product if bias is None else product + bias

    def sample(self, logits: Float32Array, requests: SamplingRequests, *, top: int) -> SampledTokens:
        return self.score(logits, sample_tokens(logits, requests), top=top)

    def score(self, logits: Float32Array, targets: IntArray, *, top: int) -> SampledTokens:
        scan = self.scan(logits, targets, first=0, top=top)
        logprobs, top_logprobs = logprobs_of(scan)
        return SampledTokens(targets.astype(np.int32), logprobs, scan.top_tokens, top_logprobs)

    def take_outputs(self, matrix: Array, outputs: range) -> Array:
        return matrix[:, outputs.start : outputs.stop]

    def scan(self, logits: Float32Array, targets: IntArray, *, first: int, top: int) -> LogitScan:
        rows, width = logits.shape
        top_tokens = np.empty((rows, min(top, width)), np.int32)
        at_once = max(1, MOST_SCORES // max(width, 1))
        for start in range(0, rows if top else 0, at_once):
            piece = slice(start, start + at_once)
            top_tokens[piece] = likeliest(without_nan(logits[piece]), top)
        places = np.minimum(np.maximum(targets - first, 0), width - 1)
        numbers = np.arange(rows)
        target_logits, top_logits = logits[numbers, places], logits[numbers[:, None], top_tokens]
        return LogitScan(*self._exponential_sums(logits), target_logits, top_tokens, top_logits)

    def tokens_above(self, logits: Float32Array, least: Float32Array) -> tuple[IntArray, IntArray, Float32Array]:
        rows, columns = np.nonzero(logits > least[:, None])
        values: Float32Array = logits[rows, columns]
        return rows, columns, values

    # Precision and reproducibility

    def _stored(self, values: Float32Array) -> Float32Array:
        return round_to_bfloat16(values) if self.is_bfloat16 else values

    @np.errstate(over="ignore", invalid="ignore")
    def _exponential_sums(self, logits: Float32Array) -> tuple[Float32Array, Float32Array]:
        """The largest number m of each block of logits (N, V), and the sum of exp(x - m) (N, blocks)."""
        firsts = range(0, logits.shape[1], SUM_TOKENS)
        highest, sums = np.empty((2, len(logits), len(firsts)), np.float32)
        for number, first in enumerate(firsts):
            block = logits[:, first : first + SUM_TOKENS]
            highest[:, number] = most = block.max(axis=1)
            sums[:, number] = np.exp(block - np.where(np.isneginf(most), 0, most)[:, None]).sum(axis=1)
        return highest, sums

    def _stored_logits(self, logits: Float32Array, router: Router) -> Float32Array:
        return logits if router.float32_logits else self._stored(logits)

    def _product(self, x: Float32Array, matrix: Array) -> Float32Array:
        inputs, outputs = matrix.shape
        most_rows = max(FEWEST_ROWS, int(PIECE_FLOPS / (2 * inputs * outputs)))
        product = np.empty((len(x), outputs), np.float32)
        for first in range(0, len(x), most_rows):
            rows = x[first : first + most_rows]
            blocks = np.matmul(_in_blocks(rows).reshape(-1, BLOCK, inputs), matrix)
            product[first : first + most_rows] = blocks.reshape(-1, outputs)[: len(rows)]
            self._progress()
        return product


def _in_blocks(x: Float32Array) -> Float32Array:
    """The rows, and rows of zeros up to a multiple of BLOCK."""
    padded = np.zeros((-(-len(x) // BLOCK) * BLOCK, *x.shape[1:]), np.float32)
    padded[: len(x)] = x
    return padded
