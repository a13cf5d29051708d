"""Qwen2-MoE (Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): biases before attention, a gated shared expert."""

from typing import Any

from moempi.config.architecture import Architecture, Experts, Router
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._family import DECODER_NAMES, Family, in_layers
from moempi.config.families._reading import CheckpointConfig, dense_layers, head_dim, windowed_layers
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    return decoder(
        config,
        "qwen2_moe",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            biases="qkv" if config.option("qkv_bias", absent=True) else "none",
            **_windows(config),
        ),
        experts=Experts(
            num=config.integer("num_experts", "num_local_experts"),
            width=config.integer("moe_intermediate_size"),
            router=Router(top_k=config.integer("num_experts_per_tok"), renormalize=config.flag("norm_topk_prob")),
            shared_width=config.integer("shared_expert_intermediate_size"),
            shared_gate=True,
        ),
        dense_layers=dense_layers(config),
    )


def _windows(config: CheckpointConfig) -> dict[str, Any]:
    """The window fields of AttentionShape; requires `layer_types`, without which implementations differ."""
    config.ignore("max_window_layers")
    if not config.option("use_sliding_window"):
        config.ignore("sliding_window")
        return {}
    if not config.has("layer_types"):
        raise config.error("use_sliding_window = True is not supported without layer_types")
    return {"window": config.integer("sliding_window"), "windowed_layers": windowed_layers(config)}


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture=_architecture,
    names=DECODER_NAMES
    | in_layers(
        {
            "shared/gate": "mlp.shared_expert.gate_proj.weight",
            "shared/up": "mlp.shared_expert.up_proj.weight",
            "shared/down": "mlp.shared_expert.down_proj.weight",
            "shared_gate": "mlp.shared_expert_gate.weight",
        }
    ),
)
