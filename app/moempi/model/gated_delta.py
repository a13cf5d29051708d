"""Linear attention by the gated delta rule (Yang et al. 2025), as in Qwen3-Next."""

from collections.abc import Sequence

from msgspec import Struct

from moempi.backend.protocol import Backend
from moempi.backend.values import Array, DeltaRates, LayerState, RmsNorm, Segment
from moempi.config.architecture import DeltaRule


class GatedDelta(Struct, frozen=True):
    """Weights of one layer: `mixed` maps D to the heads' queries, keys and values, `output` the values back to D.

    `taps` (n, C) are the weights of the convolution of what `mixed` computes, `gate` maps D to the logits of the output
    gates, and `rates` to the logits of each value head's beta and decay.
    """

    rule: DeltaRule
    mixed: Array
    taps: Array
    gate: Array
    rates: Array
    constants: DeltaRates
    norm: RmsNorm
    output: Array

    def __call__(self, backend: Backend, x: Array, cache: LayerState, segments: Sequence[Segment]) -> Array:
        """Bring the states of the sequences up to date with rows x (T, D), and read them -> (T, D)."""
        rule, num_rows = self.rule, len(x)
        mixed = backend.causal_conv(backend.linear(x, self.mixed), self.taps, cache, segments)
        heads = self._heads(mixed)
        read = backend.delta_rule(heads, backend.linear(x, self.rates), self.constants, cache, segments)
        gate = backend.linear(x, self.gate).reshape(num_rows, rule.num_value_heads, rule.value_dim)
        gated = backend.gated_norm(read, gate, self.norm)
        return backend.linear(gated.reshape(num_rows, rule.num_value_heads * rule.value_dim), self.output)

    def _heads(self, mixed: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values by head."""
        rule, num_rows = self.rule, len(mixed)
        keys = rule.num_key_heads * rule.key_dim
        return (
            mixed[:, :keys].reshape(num_rows, rule.num_key_heads, rule.key_dim),
            mixed[:, keys : 2 * keys].reshape(num_rows, rule.num_key_heads, rule.key_dim),
            mixed[:, 2 * keys :].reshape(num_rows, rule.num_value_heads, rule.value_dim),
        )
