"""Parts of a layer in few calls of layer.c: the bits of the separate verbs, without their time in Python."""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np

from moempi.arrays import Float32Array, Int32Array, IntArray
from moempi.arrays import address_of as _at
from moempi.backend.cpu import kernel_calls as calls
from moempi.backend.cpu.attention_layout import CachedRows
from moempi.backend.cpu.kernels import SCORINGS, Kernels, PanelMatrix
from moempi.backend.cpu.router import TOP_OF_GROUP
from moempi.backend.values import AttentionBlock, Cache, ExpertsBlock, RmsNorm, Segment

FUSED_FLOPS = 5e8
"""Most work of a thread in one call, some milliseconds: it does not call `progress`."""
FUSED_BYTES = 2e8
"""Most bytes of experts that a thread reads in one call, some milliseconds, too."""
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
        self._kernels, self._block, self._lay_out, self._progress = kernels, block, lay_out, progress
        self._heads = block.num_heads, block.num_kv_heads, block.head_dim
        of_queries, of_keys = block.head_norms or (None, None)
        self._layer = calls.AttentionLayer(
            _matrix(block.qkv, block.qkv_bias), _matrix(block.output, block.output_bias),
            _norm(block.norm, rounded), _norm(of_queries, rounded), _norm(of_keys, rounded),
            _norm(block.next_norm, rounded), block.num_heads, block.num_kv_heads, block.head_dim, block.scale,
            block.interleaved, rounded,
        )  # fmt: skip
        self._layer_at = ctypes.addressof(self._layer)
        self._sinks_at = None if block.sinks is None else _at(block.sinks)
        self._rounded = rounded
        self._cache: Cache | None = None
        self._cache_at = 0, 0
        self.most_rows = _most_rows(kernels, block.qkv, block.output)

    def __call__(
        self, x: Float32Array, angles: tuple[Float32Array, Float32Array], cache: Cache, segments: Sequence[Segment]
    ) -> tuple[Float32Array, Float32Array]:
        kernels, layout, (rows, width), (cosine, sine) = self._kernels, self._lay_out(segments), x.shape, angles
        num_heads, kv_heads, dim = self._heads
        tasks = layout.attention_tasks(kv_heads, num_heads // kv_heads, kernels.chunk)
        segments_at, pages_at, cached_at = layout.addresses
        keys_at, values_at = self._addresses_of(cache)
        x, out = np.ascontiguousarray(x), np.empty((2, rows, width), np.float32)
        heads = np.empty((2, rows, num_heads, dim), np.float32)  # queries, and what they attend to
        queries_at, sum_at = _at(heads), _at(out)
        attended_at, normed_at = queries_at + heads.nbytes // 2, sum_at + out.nbytes // 2
        call = calls.AttentionRows(
            _at(x), _at(cosine), _at(sine), keys_at, values_at, cached_at, queries_at, attended_at, sum_at, normed_at,
            kernels.workspace(kernels.library.attention_scratch(self._layer_at, rows)), rows, cosine.shape[-1],
        )  # fmt: skip
        attention = calls.Attention(
            queries_at, keys_at, values_at, attended_at, segments_at, pages_at, self._sinks_at, len(layout.segments),
            num_heads, kv_heads, dim, dim, dim, self._block.window, tasks.address, self._rounded, self._rounded,
        )  # fmt: skip
        kernels.library.begin_attention(self._layer_at, call)
        kernels.attend_tasks(attention, tasks, self._progress)
        kernels.library.end_attention(self._layer_at, call)
        return out[0], out[1]

    def _addresses_of(self, cache: Cache) -> tuple[int, int]:
        """The addresses of keys and values of the layer's cache, which stays."""
        if cache is not self._cache:
            self._cache, self._cache_at = cache, (_at(cache.keys), _at(cache.values))
        return self._cache_at


class KernelExperts:
    """`protocol.FusedExperts` of C kernels, for a block that they `can_fuse`."""

    def __init__(self, kernels: Kernels, block: ExpertsBlock, *, rounded: bool) -> None:
        self._kernels, self._block, self._top_k = kernels, block, block.rule.top_k
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
        self._layer_at = ctypes.addressof(self._layer)
        of_row = _most_rows(kernels, block.router, *[first.gate_up, first.down] * rule.top_k)
        expert_bytes = first.gate_up.packed.nbytes + first.down.packed.nbytes
        readable = int(FUSED_BYTES * kernels.threads // expert_bytes)  # experts of a call, each of which is read once
        self.most_rows = of_row if readable >= len(addresses) else min(of_row, readable // rule.top_k)

    def __call__(
        self, x: Float32Array, addends: Sequence[Float32Array], load: IntArray
    ) -> tuple[Float32Array, Int32Array, Float32Array]:
        kernels, rows = self._kernels, len(x)
        x, out = np.ascontiguousarray(x), np.empty(x.shape, np.float32)
        experts, weights = np.empty((rows, self._top_k), np.int32), np.empty((rows, self._top_k), np.float32)
        added = [np.ascontiguousarray(addend) for addend in addends]
        call = calls.ExpertsRows(
            _at(x), (calls.POINTER * 2)(*map(_at, added)), _at(out), _at(experts),
            _at(weights), _at(load),
            kernels.workspace(kernels.library.experts_scratch(self._layer_at, rows)), rows,
        )  # fmt: skip
        kernels.library.compute_experts(self._layer_at, call)
        return out, experts, weights


def can_fuse(block: ExpertsBlock) -> bool:
    """Whether layer.c computes the block: its router's rule, and gated experts that are alike."""
    kinds = {(each.gated, each.clamp, each.gate_up.weights, each.down.weights) for each in block.experts}
    return block.rule.scoring in SCORINGS and len(kinds) == 1 and block.experts[0].gated


def _most_rows(kernels: Kernels, *matrices: PanelMatrix) -> int:
    """The rows whose products with these matrices take FUSED_FLOPS of each thread, at most FUSED_ROWS."""
    of_row = sum(2 * inputs * outputs for inputs, outputs in (matrix.shape for matrix in matrices))
    return min(FUSED_ROWS, int(FUSED_FLOPS * kernels.threads // of_row))


def _matrix(matrix: PanelMatrix, bias: Float32Array | None = None) -> ctypes.Structure:
    return calls.Matrix(matrix.address, None if bias is None else _at(bias), *matrix.shape, matrix.weights)


def _norm(norm: RmsNorm | None, rounded: bool) -> ctypes.Structure:
    return (
        calls.NormWeights() if norm is None else calls.NormWeights(_at(norm.weight), norm.eps, norm.rounded and rounded)
    )
