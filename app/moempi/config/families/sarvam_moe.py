"""Sarvam-MoE (sarvam-30b): GLM-4.5 whose whole heads are rotated; one matrix of queries, keys and values."""

from moempi.config.architecture import Architecture, Experts
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._deepseek import corrected_router
from moempi.config.families._family import DECODER_NAMES, FUSED_NAMES, Family, Names, Rows, in_layers
from moempi.config.families._reading import CheckpointConfig, head_dim, leading_dense_layers
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("use_bias", "sliding_window")
    config.require("score_function", "sigmoid", None)
    config.require("moe_router_enable_expert_bias", True, None)
    config.ignore("max_window_layers")
    width = config.integer("moe_intermediate_size")
    shared_width = config.integer("n_shared_experts", "num_shared_experts") * width
    config.require("moe_shared_expert_intermediate_size", shared_width, None)
    return decoder(
        config,
        "sarvam_moe",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            qk_norm="head" if config.option("use_qk_norm", absent=True) else "none",
            biases="qkv" if config.flag("attention_bias", "use_qkv_bias") else "none",
        ),
        experts=Experts(
            num=config.integer("n_routed_experts", "num_experts", "num_local_experts"),
            width=width,
            router=corrected_router(config, absent_groups=1, renormalize=config.option("norm_topk_prob", absent=True)),
            shared_width=shared_width,
        ),
        dense_layers=leading_dense_layers(config),
    )


def _rows_of_heads(architecture: Architecture) -> tuple[int, ...]:
    heads = architecture.attention
    return heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim


def _joined(ours: tuple[str, ...], theirs: str) -> Names:
    return {f"attention/{name}": Rows(theirs, part, _rows_of_heads) for part, name in enumerate(ours)}


_HUB = {
    "embedding": "model.word_embeddings.weight",
    **in_layers(
        {
            **_joined(("q", "k", "v"), "attention.query_key_value.weight"),
            **_joined(("q_bias", "k_bias", "v_bias"), "attention.query_key_value.bias"),
            "attention/o": "attention.dense.weight",
            "attention/q_norm": "attention.query_layernorm.weight",
            "attention/k_norm": "attention.key_layernorm.weight",
            "router_correction": "mlp.gate.expert_bias",
        }
    ),
}

SARVAM_MOE = Family(
    model_type="sarvam_moe",
    architecture=_architecture,
    names=DECODER_NAMES | _HUB,
    fused_names=FUSED_NAMES | {name: DECODER_NAMES[name] for name in _HUB},
)
