"""Mixtral (Mixtral-8x7B, Mixtral-8x22B): softmax router with renormalized float32 weights."""

from moempi.config.architecture import Architecture, Experts, Router
from moempi.config.families._decoder import all_layers_windowed, decoder, heads
from moempi.config.families._family import FUSED_NAMES, MIXTRAL_NAMES, Family, in_layers
from moempi.config.families._reading import CheckpointConfig, head_dim
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("attention_bias")
    config.ignore("router_jitter_noise")  # of training
    return decoder(
        config,
        "mixtral",
        attention=heads(config, rope=read_rope(config, dim=head_dim(config)), **all_layers_windowed(config)),
        experts=Experts(
            num=config.integer("num_local_experts", "num_experts"),
            width=config.integer("intermediate_size"),
            router=Router(top_k=config.integer("num_experts_per_tok"), renormalize=True, float32_weights=True),
        ),
    )


MIXTRAL = Family(
    model_type="mixtral",
    architecture=_architecture,
    names=MIXTRAL_NAMES,
    fused_names=FUSED_NAMES | in_layers({"router": "mlp.gate.weight"}),
)
