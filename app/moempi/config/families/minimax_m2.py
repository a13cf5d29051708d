"""MiniMax-M2 (M2 to M2.7): query and key norms over all heads, half of each head rotated, a corrected sigmoid router.

The router's matrix is float32 on the hub, and its logits are computed in float32 there.
"""

from moempi.config.architecture import Architecture, Experts, Router
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._family import FUSED_NAMES, MIXTRAL_NAMES, Family, in_layers
from moempi.config.families._reading import CheckpointConfig, head_dim, num_layers
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("sliding_window", "shared_intermediate_size")
    config.require("scoring_func", "sigmoid", None)
    config.require("use_qk_norm", True, None)
    config.require("qk_norm_type", "per_layer", None)
    config.require("use_routing_bias", True, None)
    config.require("attn_type_list", [1] * num_layers(config), None)
    config.ignore("mlp_intermediate_size", "max_model_len", "router_jitter_noise")
    return decoder(
        config,
        "minimax_m2",
        attention=heads(config, rope=read_rope(config, dim=head_dim(config), partial=True), qk_norm="vector"),
        experts=Experts(
            num=config.integer("num_local_experts", "num_experts"),
            width=config.integer("intermediate_size"),
            router=Router(
                top_k=config.integer("num_experts_per_tok"),
                scoring="sigmoid",
                correction=True,
                renormalize=True,
                float32_logits=True,
                float32_weights=True,
            ),
        ),
    )


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture=_architecture,
    names=MIXTRAL_NAMES | in_layers({"router_correction": "block_sparse_moe.e_score_correction_bias"}),
    fused_names=FUSED_NAMES
    | in_layers({"router": "mlp.gate.weight", "router_correction": "mlp.e_score_correction_bias"}),
    more_layers=True,
)
