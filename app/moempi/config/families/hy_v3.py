"""Hy3: per-head query and key norms, a sigmoid router with a correction and scaled weights, shared experts."""

from moempi.config.architecture import Architecture, Experts, Router
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._family import DECODER_NAMES, FUSED_NAMES, Family, in_layers
from moempi.config.families._reading import CheckpointConfig, head_dim, leading_dense_layers
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("mlp_bias", "sliding_window")
    for key in ("qk_norm", "route_norm", "moe_router_use_sigmoid", "moe_router_enable_expert_bias"):
        config.require(key, True, None)
    config.ignore("enable_moe_fp32_combine", "enable_lm_head_fp32", "enable_attention_fp32_softmax")  # rounding
    width = config.integer("moe_intermediate_size", "expert_hidden_dim")
    return decoder(
        config,
        "hy_v3",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            qk_norm="head",
            biases="all" if config.option("attention_bias") else "none",
        ),
        experts=Experts(
            num=config.integer("num_experts", "num_local_experts"),
            width=width,
            router=Router(
                top_k=config.integer("num_experts_per_tok"),
                scoring="sigmoid",
                correction=True,
                renormalize=True,
                scaling=config.number("router_scaling_factor"),
                float32_logits=True,
                float32_weights=True,
            ),
            shared_width=config.integer("num_shared_experts") * width,
        ),
        dense_layers=leading_dense_layers(config),
    )


_CORRECTION = {"router_correction": "mlp.e_score_correction_bias"}
_SHARED = {f"shared/{name}": f"mlp.shared_mlp.{name}_proj.weight" for name in ("gate", "up", "down")}

HY_V3 = Family(
    model_type="hy_v3",
    architecture=_architecture,
    names=DECODER_NAMES
    | in_layers({"router": "mlp.router.gate.weight", "router_correction": "mlp.expert_bias", **_SHARED}),
    fused_names=FUSED_NAMES
    | in_layers({name: theirs.replace("shared_mlp", "shared_experts") for name, theirs in _SHARED.items()})
    | in_layers({"router": "mlp.gate.weight", **_CORRECTION}),
    more_layers=True,
)
