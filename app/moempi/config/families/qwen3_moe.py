"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder): per-head query and key norms, softmax router."""

from moempi.config.architecture import Architecture, Attention, Experts, Rope, Router
from moempi.config.families._family import DECODER_NAMES, Family
from moempi.config.families._reading import CheckpointConfig, dense_layers, head_dim, num_layers, rope_theta


def _architecture(config: CheckpointConfig) -> Architecture:
    config.require("hidden_act", "silu")
    config.refuse("attention_bias", "use_sliding_window", "quantization_config")
    dense = dense_layers(config)
    bos = config.tokens("bos_token_id")
    return Architecture(
        family="qwen3_moe",
        vocab_size=config.integer("vocab_size"),
        width=config.integer("hidden_size"),
        num_layers=num_layers(config),
        max_positions=config.integer("max_position_embeddings"),
        attention=Attention(
            num_heads=config.integer("num_attention_heads"),
            num_kv_heads=config.integer("num_key_value_heads"),
            head_dim=head_dim(config),
            qk_norm="head",
            rope=Rope(theta=rope_theta(config)),
        ),
        experts=Experts(
            num=config.integer("num_experts", "num_local_experts"),
            width=config.integer("moe_intermediate_size"),
            router=Router(top_k=config.integer("num_experts_per_tok"), renormalize=config.flag("norm_topk_prob")),
        ),
        dense_layers=dense,
        dense_width=config.integer("intermediate_size") if dense else 0,
        norm_eps=config.number("rms_norm_eps"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        bos_token=bos[0] if bos else None,
        eos_tokens=config.tokens("eos_token_id"),
    )


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture=_architecture,
    names=DECODER_NAMES
    | {
        "layers/{layer}/attention/q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
        "layers/{layer}/attention/k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
    },
)
