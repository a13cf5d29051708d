"""Selective state spaces (Mamba-2, Dao & Gu 2024), as in Nemotron-H."""

from collections.abc import Sequence

from msgspec import Struct

from moempi.backend.protocol import Backend
from moempi.backend.values import Array, LayerState, Segment, StateConstants
from moempi.config.architecture import StateSpace


class StateSpaceMixer(Struct, frozen=True):
    """Weights of one layer: `mixed` maps D to the heads and to the inputs and outputs of the groups' states.

    `taps` (n, C) and `taps_bias` (C,) are of the convolution of what `mixed` computes, `gate` maps D to the logits of
    the output gates, `steps` to those of the heads' steps, and `output` the heads back to D. `norms` are the weights of
    the norm of each group's heads.
    """

    space: StateSpace
    eps: float
    mixed: Array
    taps: Array
    taps_bias: Array
    gate: Array
    steps: Array
    constants: StateConstants
    norms: Sequence[Array]
    output: Array

    def __call__(self, backend: Backend, x: Array, cache: LayerState, segments: Sequence[Segment]) -> Array:
        """Bring the states of the sequences up to date with rows x (T, D), and read them -> (T, D)."""
        mixed = backend.causal_conv(backend.linear(x, self.mixed), self.taps, cache, segments, self.taps_bias)
        heads, steps = self._heads(mixed), backend.linear(x, self.steps)
        read = backend.state_space(
            heads, steps, self.constants, cache, segments, least_step=self.space.least_step
        ).reshape(len(x), self.space.num_heads * self.space.head_dim)
        gated = backend.swiglu(backend.join_columns(backend.linear(x, self.gate), read))
        return backend.linear(self._normalized(backend, gated), self.output)

    def _heads(self, mixed: Array) -> tuple[Array, Array, Array]:
        """Outputs and inputs of the state by group, and the heads."""
        space, num_rows = self.space, len(mixed)
        values, keys = space.num_heads * space.head_dim, space.num_groups * space.state_dim
        return (
            mixed[:, values + keys :].reshape(num_rows, space.num_groups, space.state_dim),
            mixed[:, values : values + keys].reshape(num_rows, space.num_groups, space.state_dim),
            mixed[:, :values].reshape(num_rows, space.num_heads, space.head_dim),
        )

    def _normalized(self, backend: Backend, gated: Array) -> Array:
        """Each group of heads divided by its root mean square, times its weights."""
        size = gated.shape[1] // len(self.norms)
        groups = [gated[:, group * size : (group + 1) * size] for group in range(len(self.norms))]
        return backend.join_columns(
            *(backend.rms_norm(part, weight, eps=self.eps) for part, weight in zip(groups, self.norms, strict=True))
        )
