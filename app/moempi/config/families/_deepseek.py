"""Shared by DeepSeek-V2, -V3 and related families: latent attention, and the router with a correction."""

from typing import Any

from moempi.config.architecture import Architecture, AttentionShape, Experts, Indexer, Latent, Router
from moempi.config.families._decoder import decoder
from moempi.config.families._family import DECODER_NAMES, in_layers
from moempi.config.families._reading import CheckpointConfig, leading_dense_layers
from moempi.config.families._rope import read_rope, rope_kind, scaling_of, yarn_magnitude

DEEPSEEK_NAMES = DECODER_NAMES | in_layers(
    {
        "attention/q_latent": "self_attn.q_a_proj.weight",
        "attention/q_latent_bias": "self_attn.q_a_proj.bias",
        "attention/q_latent_norm": "self_attn.q_a_layernorm.weight",
        "attention/kv_latent": "self_attn.kv_a_proj_with_mqa.weight",
        "attention/kv_latent_bias": "self_attn.kv_a_proj_with_mqa.bias",
        "attention/kv_latent_norm": "self_attn.kv_a_layernorm.weight",
        "attention/q_expand": "self_attn.q_b_proj.weight",
        "attention/kv_expand": "self_attn.kv_b_proj.weight",
    }
)


def deepseek(config: CheckpointConfig, family: str, *, router: Router, indexer: Indexer | None = None) -> Architecture:
    """The architecture with latent attention, and experts from layer `first_k_dense_replace` on."""
    return decoder(
        config,
        family,
        attention=_latent_attention(config, indexer),
        experts=Experts(**routed_and_shared(config), router=router),
        dense_layers=leading_dense_layers(config),
    )


def routed_and_shared(config: CheckpointConfig) -> dict[str, Any]:
    """The size fields of Experts; the shared experts are one network with the sum of their widths."""
    width = config.integer("moe_intermediate_size")
    return {
        "num": config.integer("n_routed_experts", "num_local_experts"),
        "width": width,
        "shared_width": config.integer("n_shared_experts") * width if config.has("n_shared_experts") else 0,
    }


def corrected_router(
    config: CheckpointConfig, *, absent_groups: int | None = None, renormalize: bool | None = None
) -> Router:
    """The router of DeepSeek-V3: sigmoid scores, selection with a correction and within the best groups.

    `absent_groups` is the number of groups in families whose configurations may leave it out. `renormalize` is what
    `norm_topk_prob` means, for families whose configurations may leave that out.
    """
    has_groups = config.has("n_group") or config.has("topk_group")
    if absent_groups is None or has_groups:
        groups, kept = config.integer("n_group"), config.integer("topk_group")
    else:
        groups, kept = absent_groups, absent_groups
    config.require("scoring_func", "sigmoid", "noaux_tc", None)
    config.require("topk_method", "noaux_tc", None)
    return Router(
        top_k=config.integer("num_experts_per_tok"),
        scoring="sigmoid",
        correction=True,
        num_groups=groups,
        kept_groups=kept,
        group_score="top2",
        renormalize=config.flag("norm_topk_prob") if renormalize is None else renormalize,
        scaling=config.number("routed_scaling_factor"),
        float32_logits=True,
        float32_weights=True,
    )


def _latent_attention(config: CheckpointConfig, indexer: Indexer | None) -> AttentionShape:
    heads, rope_dim = config.integer("num_attention_heads"), config.integer("qk_rope_head_dim")
    config.require("num_key_value_heads", heads, None)
    config.ignore("head_dim", "qk_head_dim")
    return AttentionShape(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=config.integer("qk_nope_head_dim") + rope_dim,
        rope=read_rope(config, dim=rope_dim, interleaved=config.option("rope_interleave", absent=True)),
        biases="all" if config.option("attention_bias") else "none",
        score_factor=_score_factor(config),
        latent=Latent(
            key_value_rank=config.integer("kv_lora_rank"),
            rope_dim=rope_dim,
            value_dim=config.integer("v_head_dim"),
            query_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else 0,
            indexer=indexer,
        ),
    )


def _score_factor(config: CheckpointConfig) -> float:
    """The square of YaRN's magnitude at `mscale_all_dim`, a factor on the attention scores."""
    scaling = scaling_of(config)
    if scaling is None or rope_kind(scaling) == "default" or not scaling.has("mscale_all_dim"):
        return 1.0
    magnitude = yarn_magnitude(scaling.number("factor"), scaling.number("mscale_all_dim"))
    return magnitude * magnitude
