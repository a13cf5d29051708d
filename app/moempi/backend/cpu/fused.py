"""Layers and their parts in few calls of layer.c: the bits of the separate verbs, without their time in Python."""

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import numpy as np

from moempi.arrays import Float32Array, Int32Array, IntArray
from moempi.arrays import address_of as _at
from moempi.backend.cpu import kernel_calls as calls
from moempi.backend.cpu.attention_layout import CachedRows
from moempi.backend.cpu.kernels import SCORINGS, Kernels, PanelMatrix
from moempi.backend.cpu.router import TOP_OF_GROUP
from moempi.backend.values import AttentionBlock, Cache, ExpertsBlock, PhysicalIds, RmsNorm, Segment, Segments

FUSED_FLOPS = 5e8
"""Most work of a thread in one call, some milliseconds: it does not call `progress`."""
FUSED_BYTES = 2e8
"""Most bytes of weights and cache that a thread reads in one call, some milliseconds, too."""
FLOAT32_BYTES = 4
FUSED_ROWS = 512
"""Most rows of a call, which limits scratch memory."""


class KernelAttention:
    """`protocol.FusedAttention` of C kernels; `lay_out` gives the layout of a step's segments."""

    def __init__(
        self,
        kernels: Kernels,
        block: AttentionBlock,
        lay_out: Callable[[Sequence[Segment]], CachedRows],
        *,
        rounded: bool,
        progress: Callable[[], None],
    ) -> None:
        self._kernels, self.block, self._lay_out, self._progress = kernels, block, lay_out, progress
        self.heads = block.num_heads, block.num_kv_heads, block.head_dim
        of_queries, of_keys = block.head_norms or (None, None)
        self._layer = calls.AttentionLayer(
            _matrix(block.qkv, block.qkv_bias), _matrix(block.output, block.output_bias),
            _norm(block.norm, rounded), _norm(of_queries, rounded), _norm(of_keys, rounded),
            _norm(block.next_norm, rounded), block.num_heads, block.num_kv_heads, block.head_dim, block.scale,
            block.interleaved, rounded,
        )  # fmt: skip
        self.address = ctypes.addressof(self._layer)
        self.sinks_at = None if block.sinks is None else _at(block.sinks)
        self._rounded = rounded
        self._cache: Cache | None = None
        self._cache_at = 0, 0
        self.most_rows = _most_rows(kernels, block.qkv, block.output)

    def __call__(
        self,
        x: Float32Array,
        angles: tuple[Float32Array, Float32Array],
        cache: Cache,
        segments: Sequence[Segment],
        ids: PhysicalIds | None = None,
    ) -> tuple[Float32Array, Float32Array, None]:
        kernels, layout, (rows, width), (cosine, sine) = self._kernels, self._lay_out(segments), x.shape, angles
        num_heads, kv_heads, dim = self.heads
        tasks = layout.attention_tasks(kv_heads, num_heads // kv_heads, kernels.chunk)
        segments_at, pages_at, cached_at = layout.addresses
        keys_at, values_at = self.addresses_of(cache)
        x, out = np.ascontiguousarray(x), np.empty((2, rows, width), np.float32)
        heads = np.empty((2, rows, num_heads, dim), np.float32)  # queries, and what they attend to
        queries_at, sum_at = _at(heads), _at(out)
        attended_at, normed_at = queries_at + heads.nbytes // 2, sum_at + out.nbytes // 2
        call = calls.AttentionRows(
            _at(x), _at(cosine), _at(sine), keys_at, values_at, cached_at, queries_at, attended_at, sum_at, normed_at,
            kernels.workspace(kernels.library.attention_scratch(self.address, rows)), rows, cosine.shape[-1],
        )  # fmt: skip
        attention = calls.Attention(
            queries_at, keys_at, values_at, attended_at, segments_at, pages_at, self.sinks_at, len(layout.segments),
            num_heads, kv_heads, dim, dim, dim, self.block.window, tasks.address, self._rounded, self._rounded,
        )  # fmt: skip
        kernels.library.begin_attention(self.address, call)
        kernels.attend_tasks(attention, tasks, self._progress)
        kernels.library.end_attention(self.address, call)
        return out[0], out[1], None

    def addresses_of(self, cache: Cache) -> tuple[int, int]:
        """The addresses of keys and values of the layer's cache, which stays."""
        if cache is not self._cache:
            self._cache, self._cache_at = cache, (_at(cache.keys), _at(cache.values))
        return self._cache_at


class KernelExperts:
    """`protocol.FusedExperts` of C kernels, for a block that they `can_fuse`."""

    def __init__(self, kernels: Kernels, block: ExpertsBlock, *, rounded: bool) -> None:
        self._kernels, self.block, self.top_k = kernels, block, block.rule.top_k
        rule, first, clamp = block.rule, block.experts[0], block.experts[0].clamp
        self._correction = None if block.correction is None else np.ascontiguousarray(block.correction, np.float32)
        tensors = [(each.gate_up.packed, each.down.packed, each.gate_up_bias, each.down_bias) for each in block.experts]
        addresses = [[None if one is None else _at(one) for one in each] for each in tensors]
        self._experts = (calls.Expert * len(addresses))(*(calls.Expert(*each) for each in addresses))
        self._layer = calls.ExpertsLayer(
            _matrix(block.router, block.router_bias), _matrix(first.gate_up), _matrix(first.down),
            ctypes.addressof(self._experts), None if self._correction is None else _at(self._correction),
            len(addresses), rule.top_k, rule.num_groups, rule.kept_groups, TOP_OF_GROUP[rule.group_score],
            SCORINGS.index(rule.scoring), rule.renormalize, rounded and not rule.float32_logits,
            rounded and not rule.float32_weights, rule.least_sum, rule.scaling, clamp is not None,
            0.0 if clamp is None else clamp.limit, 0.0 if clamp is None else clamp.alpha, rounded,
        )  # fmt: skip
        self.address = ctypes.addressof(self._layer)
        of_row = _most_rows(kernels, block.router, *[first.gate_up, first.down] * rule.top_k)
        expert_bytes = first.gate_up.packed.nbytes + first.down.packed.nbytes
        readable = int(FUSED_BYTES * kernels.threads // expert_bytes)  # experts of a call, each of which is read once
        self.most_rows = of_row if readable >= len(addresses) else min(of_row, readable // rule.top_k)

    def __call__(
        self, x: Float32Array, addends: Sequence[Float32Array], load: IntArray
    ) -> tuple[Float32Array, Int32Array, Float32Array]:
        kernels, rows = self._kernels, len(x)
        x, out = np.ascontiguousarray(x), np.empty(x.shape, np.float32)
        experts, weights = np.empty((rows, self.top_k), np.int32), np.empty((rows, self.top_k), np.float32)
        added = [np.ascontiguousarray(addend) for addend in addends]
        call = calls.ExpertsRows(
            _at(x), (calls.POINTER * 2)(*map(_at, added)), _at(out), _at(experts),
            _at(weights), _at(load),
            kernels.workspace(kernels.library.experts_scratch(self.address, rows)), rows,
        )  # fmt: skip
        kernels.library.compute_experts(self.address, call)
        return out, experts, weights


class KernelLayers:
    """`protocol.FusedLayers` of the fused parts of layers, which `are_alike`."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[tuple[KernelAttention, KernelExperts]],
        lay_out: Callable[[Sequence[Segment]], CachedRows],
    ) -> None:
        self._kernels, self._attentions, self._lay_out = kernels, [attention for attention, _ in layers], lay_out
        self._experts = [experts for _, experts in layers]
        self._layers = (calls.FusedLayer * len(layers))(
            *(
                calls.FusedLayer(of.address, experts.address, None, None, of.sinks_at, of.block.window)
                for of, experts in layers
            )
        )
        self._cost = _Cost.of(*layers[0])

    def most_layers(self, num_rows: int, segments: Sequence[Segment]) -> int:
        layout, (heads, kv_heads, _) = self._lay_out(segments), self._attentions[0].heads
        scores = layout.attention_tasks(kv_heads, heads // kv_heads, self._kernels.chunk).scores
        of = Segments.of(segments)
        positions = int((of.starts + of.lengths).sum())
        return self._cost.most_layers(num_rows, scores, positions, threads=self._kernels.threads)

    def __call__(
        self,
        layers: range,
        x: Float32Array,
        angles: tuple[Float32Array, Float32Array],
        caches: Sequence[Cache],
        segments: Sequence[Segment],
        loads: Sequence[IntArray],
    ) -> tuple[Float32Array, Int32Array, Float32Array]:
        kernels, layout, rows, (cosine, sine) = self._kernels, self._lay_out(segments), len(x), angles
        heads, kv_heads, _ = self._attentions[0].heads
        tasks = layout.attention_tasks(kv_heads, heads // kv_heads, kernels.chunk)
        segments_at, pages_at, cached_at = layout.addresses
        for number, cache in zip(layers, caches, strict=True):
            layer = self._layers[number]
            layer.keys, layer.values = self._attentions[number].addresses_of(cache)
        x, out = np.ascontiguousarray(x), np.empty(x.shape, np.float32)
        chosen = len(layers), rows, self._experts[0].top_k
        experts, weights = np.empty(chosen, np.int32), np.empty(chosen, np.float32)
        loads_at = (calls.POINTER * len(loads))(*map(_at, loads))
        first = ctypes.addressof(self._layers) + layers.start * ctypes.sizeof(calls.FusedLayer)
        call = calls.LayersRows(
            _at(x), _at(cosine), _at(sine), cached_at, segments_at, pages_at, tasks.address, _at(out), _at(experts),
            _at(weights), ctypes.addressof(loads_at),
            kernels.workspace(kernels.library.layers_scratch(first, len(layers), rows)), rows, cosine.shape[-1],
            len(layout.segments),
        )  # fmt: skip
        kernels.library.compute_layers(first, len(layers), call)
        return out, experts, weights


def are_alike(layers: Sequence[tuple[KernelAttention, KernelExperts]]) -> bool:
    """Whether layer.c computes the layers in one call: equal numbers of heads, and equal shapes of matrices."""
    kinds = {
        (
            *attention.heads,
            experts.block.rule,
            len(experts.block.experts),
            *(matrix.shape for matrix in _matrices(attention, experts)),
        )
        for attention, experts in layers
    }
    return len(kinds) == 1


class _Cost(NamedTuple):
    """What a layer costs: operations of a row and of a score of all heads, bytes of a position and of weights."""

    row_flops: int
    score_flops: int
    position_bytes: int
    attention_bytes: int
    expert_bytes: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, attention: KernelAttention, experts: KernelExperts) -> Self:
        qkv, output, router, gate_up, down = _matrices(attention, experts)
        heads, kv_heads, dim = attention.heads
        return cls(
            _flops(qkv, output, router, *[gate_up, down] * experts.top_k),
            4 * heads * dim,
            2 * kv_heads * dim * FLOAT32_BYTES,  # at most
            qkv.packed.nbytes + output.packed.nbytes + router.packed.nbytes,
            gate_up.packed.nbytes + down.packed.nbytes,
            len(experts.block.experts),
            experts.top_k,
        )

    def most_layers(self, num_rows: int, scores: int, positions: int, *, threads: int) -> int:
        """The layers whose work is at most FUSED_FLOPS and FUSED_BYTES of each thread; 0 beyond FUSED_ROWS."""
        flops = num_rows * self.row_flops + scores * self.score_flops
        num_bytes = self.attention_bytes + min(num_rows * self.top_k, self.num_experts) * self.expert_bytes
        num_bytes += positions * self.position_bytes
        most = min(FUSED_FLOPS * threads // max(flops, 1), FUSED_BYTES * threads // num_bytes)
        return int(most) if num_rows <= FUSED_ROWS else 0


def _matrices(attention: KernelAttention, experts: KernelExperts) -> tuple[PanelMatrix, ...]:
    """The matrices of a layer; all its experts are alike."""
    of, block = attention.block, experts.block
    return of.qkv, of.output, block.router, block.experts[0].gate_up, block.experts[0].down


def can_fuse(block: ExpertsBlock) -> bool:
    """Whether layer.c computes the block: its router's rule, and gated experts that are alike."""
    kinds = {(each.gated, each.clamp, each.gate_up.weights, each.down.weights) for each in block.experts}
    return block.rule.scoring in SCORINGS and len(kinds) == 1 and block.experts[0].gated


def _most_rows(kernels: Kernels, *matrices: PanelMatrix) -> int:
    """The rows whose products with these matrices take FUSED_FLOPS of each thread, at most FUSED_ROWS."""
    return min(FUSED_ROWS, int(FUSED_FLOPS * kernels.threads // _flops(*matrices)))


def _flops(*matrices: PanelMatrix) -> int:
    """Operations of a row by each of the matrices."""
    return sum(2 * inputs * outputs for inputs, outputs in (matrix.shape for matrix in matrices))


def _matrix(matrix: PanelMatrix, bias: Float32Array | None = None) -> ctypes.Structure:
    return calls.Matrix(matrix.address, None if bias is None else _at(bias), *matrix.shape, matrix.weights)


def _norm(norm: RmsNorm | None, rounded: bool) -> ctypes.Structure:
    return (
        calls.NormWeights() if norm is None else calls.NormWeights(_at(norm.weight), norm.eps, norm.rounded and rounded)
    )
