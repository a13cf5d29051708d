"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): per-head query and key norms, softmax router.

The language model of Qwen3-VL-MoE is the same, with fused experts; positions of text alone rotate as usual.
"""

from dataclasses import replace

from moempi.config.architecture import Architecture, Experts, Router
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._family import DECODER_NAMES, Family, Fused, in_layers
from moempi.config.families._reading import CheckpointConfig, dense_layers, head_dim
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("use_sliding_window", "qkv_bias", "shared_expert_intermediate_size")
    config.require("use_qk_norm", True, None)
    config.ignore("sliding_window", "max_window_layers")
    return decoder(
        config,
        "qwen3_moe",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            qk_norm="head",
            biases="all" if config.option("attention_bias") else "none",
        ),
        experts=Experts(
            num=config.integer("num_experts", "num_local_experts"),
            width=config.integer("moe_intermediate_size"),
            router=Router(top_k=config.integer("num_experts_per_tok"), renormalize=config.flag("norm_topk_prob")),
        ),
        dense_layers=dense_layers(config),
    )


QWEN3_MOE = Family(model_type="qwen3_moe", architecture=_architecture, names=DECODER_NAMES)
QWEN3_VL_MOE_TEXT = replace(
    QWEN3_MOE,
    model_type="qwen3_vl_moe_text",
    fused_names=in_layers(
        {
            "experts/gate": Fused("mlp.experts.gate_up_proj", part=0, parts=2, inputs_first=True),
            "experts/up": Fused("mlp.experts.gate_up_proj", part=1, parts=2, inputs_first=True),
            "experts/down": Fused("mlp.experts.down_proj", inputs_first=True),
        }
    ),
)
