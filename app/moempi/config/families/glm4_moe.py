"""GLM-4.5 and GLM-4.5-Air: partial rotary embedding, the router of DeepSeek-V3, shared experts."""

from moempi.config.architecture import Architecture, Experts
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._deepseek import corrected_router, routed_and_shared
from moempi.config.families._family import DECODER_NAMES, Family
from moempi.config.families._reading import CheckpointConfig, head_dim, leading_dense_layers
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("sliding_window")
    return decoder(
        config,
        "glm4_moe",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config), partial=True),
            qk_norm="head" if config.flag("use_qk_norm") else "none",
            biases="qkv" if config.flag("attention_bias") else "none",
        ),
        experts=Experts(**routed_and_shared(config), router=corrected_router(config)),
        dense_layers=leading_dense_layers(config),
    )


GLM4_MOE = Family(model_type="glm4_moe", architecture=_architecture, names=DECODER_NAMES, more_layers=True)
