"""Phi-3.5-MoE and Phi-mini-MoE: layer norms and biases, SparseMixer router, LongRoPE."""

from moempi.config.architecture import Architecture, Experts, Router
from moempi.config.families._decoder import all_layers_windowed, decoder, heads
from moempi.config.families._family import FUSED_NAMES, MIXTRAL_NAMES, Family, in_layers
from moempi.config.families._reading import CheckpointConfig, head_dim
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.ignore("original_max_position_embeddings")  # what longrope reads
    return decoder(
        config,
        "phimoe",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            biases="all" if config.flag("attention_bias") else "none",
            **all_layers_windowed(config),
        ),
        experts=Experts(
            num=config.integer("num_local_experts", "num_experts"),
            width=config.integer("intermediate_size"),
            router=Router(
                top_k=config.integer("num_experts_per_tok"),
                scoring="sparsemixer",
                jitter=config.number("router_jitter_noise"),
            ),
        ),
        norm="layer",
        head_bias=config.flag("lm_head_bias"),
    )


PHIMOE = Family(
    model_type="phimoe",
    architecture=_architecture,
    names=MIXTRAL_NAMES,
    fused_names=FUSED_NAMES | in_layers({"router": "mlp.router.weight"}),
)
