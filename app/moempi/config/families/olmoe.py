"""OLMoE (OLMoE-1B-7B): query and key norms over all heads, softmax router, optionally clipped projections."""

from moempi.config.architecture import Architecture, Experts, Router
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._family import DECODER_NAMES, Family
from moempi.config.families._reading import CheckpointConfig, head_dim
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("sliding_window")
    return decoder(
        config,
        "olmoe",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            qk_norm="vector",
            biases="all" if config.option("attention_bias") else "none",
            clip=config.number("clip_qkv") if config.has("clip_qkv") else None,
        ),
        experts=Experts(
            num=config.integer("num_experts", "num_local_experts"),
            width=config.integer("intermediate_size"),
            router=Router(top_k=config.integer("num_experts_per_tok"), renormalize=config.flag("norm_topk_prob")),
        ),
    )


OLMOE = Family(model_type="olmoe", architecture=_architecture, names=DECODER_NAMES)
