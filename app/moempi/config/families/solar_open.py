"""Solar-Open (Solar-Open-100B): the router of DeepSeek-V3 and shared experts in every layer."""

from moempi.config.architecture import Architecture, Experts
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._deepseek import corrected_router, routed_and_shared
from moempi.config.families._family import DECODER_NAMES, Family
from moempi.config.families._reading import CheckpointConfig, head_dim
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("sliding_window", "use_qk_norm", "first_k_dense_replace")
    return decoder(
        config,
        "solar_open",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            biases="qkv" if config.option("attention_bias") else "none",
        ),
        experts=Experts(**routed_and_shared(config), router=corrected_router(config, absent_groups=1)),
    )


SOLAR_OPEN = Family(model_type="solar_open", architecture=_architecture, names=DECODER_NAMES)
