"""The gated delta rule and state spaces: the launches of kernels/delta_rule.cu."""

from collections.abc import Callable, Sequence

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.cuda.launches import Launches, extents
from moempi.backend.values import Array, DeltaRates, LayerState, RmsNorm, Segment, StateConstants
from moempi.config.architecture import DeltaRule, StateSpace

BLOCK_THREADS = 128


class StateVerbs:
    """The kernels that change and read the states of sequences; see `protocol.StateVerbs`."""

    def __init__(self, launches: Launches, *, upload: Callable[[IntArray], Array]) -> None:
        self._launches = launches
        self._upload = upload
        self._segments: dict[int, tuple[Sequence[Segment], Array]] = {}

    def layer_state(self, slots: int, rule: DeltaRule | StateSpace) -> LayerState:
        """The state of `slots` sequences in one layer, of any numbers."""
        tail = (slots, rule.taps - 1, rule.mixed_dim)
        memory = (slots, *rule.memory_shape)
        device = self._launches.device
        return LayerState(device.empty(tail, np.float32), device.empty(memory, np.float32))

    def causal_conv(
        self, x: Array, taps: Array, state: LayerState, segments: Sequence[Segment], bias: Array | None = None
    ) -> Array:
        """The convolution of x (T, C) by taps (n, C), with a bias (C,)."""
        out, spans = self._launches.rows(x.shape), self._uploaded(segments)
        (_, channels, stride, _), num_taps = extents(x), len(taps)
        grid = (len(spans), -(-channels // BLOCK_THREADS), 1)
        given = (x, taps, bias, spans, state.tail, out, channels, num_taps, stride)
        self._launches.launch("delta_rule", "causal_conv", grid, BLOCK_THREADS, *given)
        return out

    def delta_rule(
        self,
        heads: tuple[Array, Array, Array],
        rates: Array,
        constants: DeltaRates,
        state: LayerState,
        segments: Sequence[Segment],
    ) -> Array:
        """The outputs (T, H, dim) of queries and keys (T, key heads, key dim) and values (T, H, dim)."""
        out, spans = self._launches.rows(heads[2].shape), self._uploaded(segments)
        _, (key_heads, key_dim, *_), (value_heads, value_dim, *_) = map(extents, heads)
        strides = [extents(part)[2] for part in heads]
        given = (*heads, rates, constants.decay_log, constants.decay_bias, spans, state.memory, out)
        grid = (len(spans), value_heads, -(-value_dim // BLOCK_THREADS))
        sizes = (key_heads, value_heads, key_dim, value_dim, *strides)
        self._launches.launch("delta_rule", "delta_rule", grid, BLOCK_THREADS, *given, *sizes)
        return out

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
        """The outputs (T, H, dim) of the states' outputs and inputs (T, groups, state dim) and of heads (T, H, dim)."""
        out, spans = self._launches.rows(heads[2].shape), self._uploaded(segments)
        _, (groups, state_dim, *_), (num_heads, head_dim, *_) = map(extents, heads)
        strides = [extents(part)[2] for part in heads]
        fixed = constants.decay_log, constants.step_bias, constants.skip
        given = (*heads, steps, *fixed, spans, state.memory, out)
        grid = (len(spans), num_heads, -(-head_dim // BLOCK_THREADS))
        sizes = (groups, num_heads, state_dim, head_dim, *strides, least_step)
        self._launches.launch("delta_rule", "state_space", grid, BLOCK_THREADS, *given, *sizes)
        return out

    def gated_norm(self, x: Array, gate: Array, norm: RmsNorm) -> Array:
        """The norm of each vector of x (T, H, dim) times silu(gate)."""
        out = self._launches.rows(x.shape)
        given = (x, gate, norm.weight, out, x.shape[-1], norm.eps)
        self._launches.by_vector("delta_rule", "gated_norm", out, *given)
        return out

    def _uploaded(self, segments: Sequence[Segment]) -> Array:
        """The segments (S, 4) are the same in all layers, so they are kept until the queue's next step."""
        queue = self._launches.device.queue
        kept = self._segments.get(queue)
        if kept is None or kept[0] is not segments:
            table = [(one.row, one.length, one.start, one.state) for one in segments]
            kept = self._segments[queue] = segments, self._upload(np.array(table, np.int64).reshape(-1, 4))
        return kept[1]
