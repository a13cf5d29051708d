"""Qwen3-Next (Qwen3-Next-80B-A3B, Qwen3-Coder-Next): gated delta rule, with inputs fused by key head."""

from moempi.config.architecture import Architecture
from moempi.config.families._family import DECODER_NAMES, Family, Rows, in_layers
from moempi.config.families._gated_delta import GATED_DELTA_NAMES, PREDICTED_TOKENS, gated_delta, rule_of
from moempi.config.families._reading import CheckpointConfig, dense_layers


def _architecture(config: CheckpointConfig) -> Architecture:
    return gated_delta(
        config, "qwen3_next", renormalize=config.flag("norm_topk_prob"), dense_layers=dense_layers(config)
    )


def _of_key_head(architecture: Architecture) -> tuple[int, ...]:
    """A key head's query and key, and the values and output gates of its value heads."""
    rule = rule_of(architecture)
    values = rule.num_value_heads // rule.num_key_heads * rule.value_dim
    return rule.key_dim, rule.key_dim, values, values


def _rates_of_key_head(architecture: Architecture) -> tuple[int, ...]:
    """The betas and the decays of a key head's value heads."""
    rule = rule_of(architecture)
    return (rule.num_value_heads // rule.num_key_heads,) * 2


_INPUTS = {
    f"delta/{name}": Rows("linear_attn.in_proj_qkvz.weight", part, _of_key_head) for part, name in enumerate("qkvz")
}
_RATES = {
    f"delta/{name}": Rows("linear_attn.in_proj_ba.weight", part, _rates_of_key_head)
    for part, name in enumerate(("beta", "decay"))
}

QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture=_architecture,
    names=DECODER_NAMES | GATED_DELTA_NAMES | in_layers({**_INPUTS, **_RATES}),
    left_out=PREDICTED_TOKENS,
)
