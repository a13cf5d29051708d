"""Shared by Qwen3-Next and Qwen3.5-MoE: layers of the gated delta rule, gated attention, norms by 1 + weight."""

from typing import Any

from moempi.config.architecture import Architecture, AttentionShape, DeltaRule, Experts, Router
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._family import OnePlus, Rows, in_layers
from moempi.config.families._reading import CheckpointConfig, head_dim, layers_of_kind, num_layers
from moempi.config.families._rope import read_rope


def gated_delta(config: CheckpointConfig, family: str, *, renormalize: bool, **others: Any) -> Architecture:
    """The architecture from the keys that both families share; `others` are further arguments of `decoder`."""
    config.refuse("attention_bias", "use_sliding_window", "sliding_window")
    config.require("attn_output_gate", True, None)
    config.require("output_gate_type", "swish", "silu", None)
    config.require("mamba_ssm_dtype", "float32", None)
    rule = DeltaRule(
        num_key_heads=config.integer("linear_num_key_heads"),
        num_value_heads=config.integer("linear_num_value_heads"),
        key_dim=config.integer("linear_key_head_dim"),
        value_dim=config.integer("linear_value_head_dim"),
        taps=config.integer("linear_conv_kernel_dim"),
    )
    layers = _delta_layers(config)
    return decoder(
        config,
        family,
        attention=_attention(config),
        experts=Experts(
            num=config.integer("num_experts", "num_local_experts"),
            width=config.integer("moe_intermediate_size"),
            router=Router(top_k=config.integer("num_experts_per_tok"), renormalize=renormalize),
            shared_width=config.integer("shared_expert_intermediate_size"),
            shared_gate=True,
        ),
        norm="rms_float32",
        float32_norms=True,
        delta_rule=rule if layers else None,
        delta_layers=layers,
        **others,
    )


def _attention(config: CheckpointConfig) -> AttentionShape:
    rope = read_rope(config, dim=head_dim(config), partial=True)
    return heads(config, rope=rope, qk_norm="head", output_gate=True)


def _delta_layers(config: CheckpointConfig) -> tuple[int, ...]:
    """The layers of type linear_attention: by `layer_types`, or all but each `full_attention_interval`-th."""
    if config.has("layer_types"):
        config.ignore("full_attention_interval")
        return layers_of_kind(config, "linear_attention")
    interval = config.integer("full_attention_interval")
    if interval < 1:
        raise config.error(f"full_attention_interval is {interval}, not a positive number")
    return tuple(layer for layer in range(num_layers(config)) if (layer + 1) % interval)


def _query_and_gate(architecture: Architecture) -> tuple[int, ...]:
    """The parts of each head."""
    return (architecture.attention.head_dim,) * 2


def _mixed(architecture: Architecture) -> tuple[int, ...]:
    """Queries, keys and values of all heads."""
    rule = rule_of(architecture)
    keys = rule.num_key_heads * rule.key_dim
    return keys, keys, rule.num_value_heads * rule.value_dim


def rule_of(architecture: Architecture) -> DeltaRule:
    """The rule of an architecture whose delta layers have tensors."""
    if architecture.delta_rule is None:
        raise ValueError("the model has no delta rule")
    return architecture.delta_rule


_TAPS = {f"delta/{name}_taps": Rows("linear_attn.conv1d.weight", part, _mixed) for part, name in enumerate("qkv")}

GATED_DELTA_NAMES = {"norm": OnePlus("model.norm.weight")} | in_layers(
    {
        "attention_norm": OnePlus("input_layernorm.weight"),
        "feed_forward_norm": OnePlus("post_attention_layernorm.weight"),
        "attention/q": Rows("self_attn.q_proj.weight", 0, _query_and_gate),
        "attention/gate": Rows("self_attn.q_proj.weight", 1, _query_and_gate),
        "attention/q_norm": OnePlus("self_attn.q_norm.weight"),
        "attention/k_norm": OnePlus("self_attn.k_norm.weight"),
        **_TAPS,
        "delta/decay_log": "linear_attn.A_log",
        "delta/decay_bias": "linear_attn.dt_bias",
        "delta/norm": "linear_attn.norm.weight",
        "delta/o": "linear_attn.out_proj.weight",
        "shared/gate": "mlp.shared_expert.gate_proj.weight",
        "shared/up": "mlp.shared_expert.up_proj.weight",
        "shared/down": "mlp.shared_expert.down_proj.weight",
        "shared_gate": "mlp.shared_expert_gate.weight",
    }
)
"""The names that both families share, beside DECODER_NAMES."""

SEPARATE_NAMES = in_layers(
    {
        **{f"delta/{name}": Rows("linear_attn.in_proj_qkv.weight", part, _mixed) for part, name in enumerate("qkv")},
        "delta/z": "linear_attn.in_proj_z.weight",
        "delta/beta": "linear_attn.in_proj_b.weight",
        "delta/decay": "linear_attn.in_proj_a.weight",
    }
)
"""The inputs of the rule by kind, in the order of their heads."""

PREDICTED_TOKENS = r"^mtp\."
"""The tensors of the layers that predict further tokens."""
