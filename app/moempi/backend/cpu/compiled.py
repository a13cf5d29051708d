"""The CPU backend with compiled kernels.

Matrices keep the type in which they are stored, and with bfloat16 the cache is bfloat16. A row's bits depend on the row
and the weights alone: not on other rows, pages, threads or, but for the decay of states (NumPy's), the processor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, Int32Array, IntArray, widen
from moempi.backend.cpu.attention_layout import CachedRows, lay_out_copies, lay_out_rows
from moempi.backend.cpu.backend import NumpyBackend
from moempi.backend.cpu.delta_rule import alpha_and_beta
from moempi.backend.cpu.fused import KernelAttention, KernelExperts, KernelLayers, are_alike, can_fuse
from moempi.backend.cpu.kernels import SCORINGS, Kernels, MatrixProduct, PanelMatrix, Rotation, contiguous_rows
from moempi.backend.cpu.state_space import alpha_and_steps
from moempi.backend.protocol import FusedAttention, FusedExperts, FusedLayers
from moempi.backend.scores import SUM_TOKENS
from moempi.backend.values import (
    Array,
    AttentionBlock,
    Cache,
    DeltaRates,
    Expert,
    ExpertsBlock,
    LayerState,
    RmsNorm,
    Segment,
    StateConstants,
    Stored,
)
from moempi.config.architecture import Clamp, Router
from moempi.config.tensors import PAGE_ROWS

COPY_BYTES = 16 << 20
"""Memory for the chosen rows of the cache; more rows are attended in several calls."""
MOST_LAYOUTS = 64
"""Layouts of rows that are kept: one for each lane that takes a step."""


class CompiledBackend(NumpyBackend):
    """`NumpyBackend` on compiled kernels with `threads` threads; products in bfloat16 use tiles if `tiled`."""

    widened = False

    def __init__(
        self,
        kernels: Kernels,
        *,
        precision: str,
        threads: int = 1,
        tiled: bool = False,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(precision=precision, progress=progress)
        self._tiled = tiled
        self.threads = kernels.use_threads(threads)
        self._kernels = kernels
        self._layouts: dict[int, CachedRows] = {}

    # Memory

    def matrix(self, *stored: Stored, transposed: bool = False) -> Array:
        return self._kernels.pack(stored, transposed=transposed, tiled=self._tiled)

    def head_matrices(self, stored: Stored) -> Sequence[PanelMatrix]:
        return [self.matrix(one, transposed=True) for one in stored]

    def table(self, stored: Stored) -> Stored:
        return stored

    def cache(self, pages: int, kv_heads: int, head_dim: int, *, latent: int = 0) -> Cache:
        dtype, shape = self.row_dtype, (pages * PAGE_ROWS, kv_heads, head_dim)
        keys = np.zeros(shape, dtype)
        return Cache(keys=keys, values=keys[..., :latent] if latent else np.zeros(shape, dtype))

    # Rows

    def embed(self, tokens: IntArray, table: Stored) -> Float32Array:
        rows = table[tokens]
        return widen(rows) if rows.dtype == np.uint16 else rows

    def rms_norm(self, x: Float32Array, weight: Float32Array, *, eps: float, rounded: bool = True) -> Float32Array:
        return self._normalize(contiguous_rows(x), weight, None, eps=eps, rounded=rounded)[1]

    def add_rms_norm(
        self, x: Float32Array, y: Float32Array, weight: Float32Array, *, eps: float, rounded: bool = True
    ) -> tuple[Float32Array, Float32Array]:
        return self._normalize(contiguous_rows(x), weight, np.ascontiguousarray(y), eps=eps, rounded=rounded)

    def _normalize(
        self, x: Float32Array, weight: Float32Array, y: Float32Array | None, *, eps: float, rounded: bool
    ) -> tuple[Float32Array, Float32Array]:
        return self._kernels.normalize(
            x, weight, y, eps=eps, quotient_rounded=rounded and self.is_bfloat16, rounded=self.is_bfloat16
        )

    def linear(self, x: Float32Array, matrix: Array, bias: Float32Array | None = None) -> Float32Array:
        return self._multiplied(x, matrix, bias, rounded=self.is_bfloat16)

    def linear_heads(self, x: Float32Array, matrices: Array) -> Float32Array:
        rows, heads, inputs = x.shape
        outputs = matrices[0].shape[1]
        out = np.empty((rows, heads, outputs), np.float32)
        parts = [MatrixProduct(matrix, rows, head * inputs, head * outputs) for head, matrix in enumerate(matrices)]
        x = x if x.strides[1:] == (x.itemsize * inputs, x.itemsize) else np.ascontiguousarray(x)
        self._multiply(x, parts, out, rounded=self.is_bfloat16)
        return out

    def swiglu(self, gate_up: Float32Array, clamp: Clamp | None = None) -> Float32Array:
        return self._kernels.activate(np.ascontiguousarray(gate_up), clamp, rounded=self.is_bfloat16)

    # Attention

    def rope_angles(
        self, positions: IntArray, *, frequencies: Float32Array, amplitude: float
    ) -> tuple[Float32Array, Float32Array]:
        return self._kernels.rope_angles(positions, np.ascontiguousarray(frequencies), amplitude)

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
        queries, keys, values = map(contiguous_rows, heads)
        rows = self._laid_out(segments).rows
        of_queries, of_keys = norms or (None, None)
        rotation = Rotation(*angles, interleaved=interleaved, rounded=self.is_bfloat16)
        self._kernels.rotate_into(cache.keys, rows, keys, rotation, of_keys)
        self._kernels.rotate_into(cache.values, rows, values)
        return self._kernels.rotate(queries, rotation, of_queries)

    def extend_cache(
        self, cache: Cache, keys: Float32Array, values: Float32Array | None, segments: Sequence[Segment]
    ) -> None:
        rows = self._laid_out(segments).rows
        for numbers, cached in ((keys, cache.keys), (values, cache.values)):
            if numbers is not None:
                self._kernels.rotate_into(cached, rows, contiguous_rows(numbers))

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
        layout = self._laid_out(segments)
        return self._kernels.attend(
            queries * np.float32(scale),
            cache,
            layout,
            window=window,
            sinks=sinks,
            rounded=self.is_bfloat16,
            progress=self._progress,
        )

    def select_positions(
        self,
        queries: Float32Array,
        weights: Float32Array,
        index: Cache,
        segments: Sequence[Segment],
        *,
        top_k: int,
    ) -> Int32Array:
        return self._kernels.select_positions(
            np.ascontiguousarray(queries),
            np.ascontiguousarray(weights),
            index,
            self._laid_out(segments),
            top_k=top_k,
            progress=self._progress,
        )

    def attend_selected(
        self,
        queries: Float32Array,
        cache: Cache,
        segments: Sequence[Segment],
        positions: Int32Array,
        *,
        scale: float,
    ) -> Float32Array:
        """Attends over copies of the chosen rows of the cache, of COPY_BYTES at a time."""
        layout, (num_rows, top_k) = self._laid_out(segments), positions.shape
        width, value_dim = cache.keys.shape[-1], cache.values.shape[-1]
        padded = -(-top_k // PAGE_ROWS) * PAGE_ROWS
        step = max(1, COPY_BYTES // (padded * width * cache.keys.itemsize))
        parts = []
        for first in range(0, num_rows, step):
            some = slice(first, first + step)
            index = layout.rows_of(np.pad(positions[some], ((0, 0), (0, padded - top_k)), mode="edge"), some)
            keys = np.empty((index.size, 1, width), cache.keys.dtype)
            self._kernels.copy_rows(cache.keys[:, 0], index.reshape(-1), keys[:, 0])
            parts.append(
                self._kernels.attend(
                    queries[some] * np.float32(scale),
                    Cache(keys, keys[..., :value_dim]),
                    lay_out_copies(len(index), top_k),
                    window=0,
                    sinks=None,
                    rounded=self.is_bfloat16,
                )
            )
            self._progress()
        return np.concatenate(parts)

    def _laid_out(self, segments: Sequence[Segment]) -> CachedRows:
        """The layout of a step's segments, which all layers share."""
        layout = self._layouts.get(id(segments))
        if layout is None or layout.of is not segments:
            while len(self._layouts) >= MOST_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
            layout = self._layouts[id(segments)] = lay_out_rows(segments)
        return layout

    # States

    def causal_conv(
        self,
        x: Float32Array,
        taps: Float32Array,
        state: LayerState,
        segments: Sequence[Segment],
        bias: Float32Array | None = None,
    ) -> Float32Array:
        spans = self._laid_out(segments).spans
        return self._kernels.convolve(
            contiguous_rows(x), taps, bias, state.tail, spans, rounded=self.is_bfloat16, progress=self._progress
        )

    def delta_rule(
        self,
        heads: tuple[Float32Array, Float32Array, Float32Array],
        rates: Float32Array,
        constants: DeltaRates,
        state: LayerState,
        segments: Sequence[Segment],
    ) -> Float32Array:
        queries, keys, values = map(contiguous_rows, heads)
        if not queries.strides[0] == keys.strides[0] == values.strides[0]:
            queries, keys, values = (np.ascontiguousarray(part) for part in heads)
        alpha, beta = alpha_and_beta(rates, constants)
        return self._kernels.apply_delta_rule(
            (queries, keys, values),
            alpha,
            beta,
            state.memory,
            self._laid_out(segments).spans,
            rounded=self.is_bfloat16,
            progress=self._progress,
        )

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
        return self._kernels.apply_state_space(
            (np.ascontiguousarray(heads[0]), np.ascontiguousarray(heads[1]), contiguous_rows(heads[2])),
            alpha_and_steps(steps, constants, least_step=least_step),
            constants.skip,
            state.memory,
            self._laid_out(segments).spans,
            rounded=self.is_bfloat16,
            progress=self._progress,
        )

    def gated_norm(self, x: Float32Array, gate: Float32Array, norm: RmsNorm) -> Float32Array:
        x, gate = np.ascontiguousarray(x), np.ascontiguousarray(gate)
        return self._kernels.normalize_gated(x, gate, norm, rounded=self.is_bfloat16)

    # Experts

    def choose_experts(
        self,
        logits: Float32Array,
        router: Router,
        *,
        correction: Float32Array | None = None,
        selection_bias: Float32Array | None = None,
    ) -> tuple[IntArray, Float32Array]:
        if router.scoring not in SCORINGS:
            return super().choose_experts(logits, router, correction=correction, selection_bias=selection_bias)
        if selection_bias is not None:
            correction = selection_bias if correction is None else correction + selection_bias
        if correction is not None:
            correction = np.ascontiguousarray(correction, np.float32)
        return self._kernels.choose_experts(np.ascontiguousarray(logits), router, correction, rounds=self.is_bfloat16)

    def pack(self, rows: Float32Array, index: IntArray | None, out: npt.NDArray[Any]) -> None:
        self._kernels.copy_rows(np.ascontiguousarray(rows), _as_index(index), out)

    def unpack(self, buffer: npt.NDArray[Any], index: IntArray | None) -> Float32Array:
        if index is None and not self.is_bfloat16:
            return buffer
        out = np.empty((len(buffer if index is None else index), buffer.shape[1]), np.float32)
        self._kernels.copy_rows(buffer, _as_index(index), out)
        return out

    def combine(
        self,
        buffer: npt.NDArray[Any],
        output_rows: IntArray,
        weights: Float32Array,
        addends: Sequence[Float32Array] = (),
    ) -> Float32Array:
        rows = np.ascontiguousarray(output_rows, np.int64)
        added = [np.ascontiguousarray(addend) for addend in addends]
        return self._kernels.combine(buffer, rows, np.ascontiguousarray(weights, np.float32), added)

    def expert_mlp(
        self, rows: Float32Array, experts: Sequence[Expert], counts: IntArray, *, out: Float32Array | None = None
    ) -> Float32Array:
        chosen = [(expert, count) for expert, count in zip(experts, counts.tolist(), strict=True) if count]
        if not chosen:
            return super().expert_mlp(rows, experts, counts, out=out)
        gate_up = self._multiplied_parts(
            rows, [(expert.gate_up, count, expert.gate_up_bias) for expert, count in chosen]
        )
        hidden = self._activated(gate_up, chosen[0][0])
        down = [(expert.down, count, expert.down_bias) for expert, count in chosen]
        return self._multiplied_parts(hidden, down, out=out)

    def _multiplied_parts(
        self,
        x: Float32Array,
        matrices: Sequence[tuple[PanelMatrix, int, Float32Array | None]],
        *,
        out: Float32Array | None = None,
    ) -> Float32Array:
        """The next count rows of x by each matrix, for (matrix, count, bias); in `out`, if it is given."""
        inputs, outputs = matrices[0][0].shape
        x = np.ascontiguousarray(x)
        out, parts, first = np.empty((len(x), outputs), np.float32) if out is None else out, [], 0
        for matrix, count, bias in matrices:
            parts.append(MatrixProduct(matrix, count, first * inputs, first * outputs, bias))
            first += count
        self._multiply(x, parts, out, rounded=self.is_bfloat16)
        return out

    # Parts of a layer

    def fuse_attention(self, block: AttentionBlock) -> FusedAttention | None:
        return KernelAttention(self._kernels, block, self._laid_out, rounded=self.is_bfloat16, progress=self._progress)

    def fuse_experts(self, block: ExpertsBlock) -> FusedExperts | None:
        return KernelExperts(self._kernels, block, rounded=self.is_bfloat16) if can_fuse(block) else None

    def fuse_layers(self, layers: Sequence[tuple[FusedAttention, FusedExperts]]) -> FusedLayers | None:
        parts = [(a, e) for a, e in layers if isinstance(a, KernelAttention) and isinstance(e, KernelExperts)]
        return KernelLayers(self._kernels, parts, self._laid_out) if are_alike(parts) else None

    # Tokens

    def logits(self, x: Float32Array, head: Array, bias: Float32Array | None = None) -> Float32Array:
        return self._multiplied(x, head, bias, rounded=False)

    def take_outputs(self, matrix: PanelMatrix, outputs: range) -> PanelMatrix:
        return self._kernels.take_outputs(matrix, outputs)

    def _exponential_sums(self, logits: Float32Array) -> tuple[Float32Array, Float32Array]:
        return self._kernels.sum_exponentials(np.ascontiguousarray(logits), block=SUM_TOKENS)

    def _multiplied(
        self, x: Float32Array, matrix: PanelMatrix, bias: Float32Array | None, *, rounded: bool
    ) -> Float32Array:
        out = np.empty((len(x), matrix.shape[1]), np.float32)
        part = MatrixProduct(matrix, len(x), bias=bias)
        self._multiply(contiguous_rows(x), [part], out, rounded=rounded)
        return out

    def _multiply(self, x: Float32Array, parts: Sequence[MatrixProduct], out: Float32Array, *, rounded: bool) -> None:
        self._kernels.multiply(x, parts, out, narrow=self.is_bfloat16, rounded=rounded, progress=self._progress)


def _as_index(index: IntArray | None) -> IntArray | None:
    return None if index is None else np.ascontiguousarray(index, np.int64)
