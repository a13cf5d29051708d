"""dots.llm1: per-head query and key norms, windows in some layers, the router of DeepSeek-V3, shared experts."""

from typing import Any

from moempi.config.architecture import Architecture, Experts
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._deepseek import corrected_router, routed_and_shared
from moempi.config.families._family import DECODER_NAMES, Family
from moempi.config.families._reading import (
    CheckpointConfig,
    head_dim,
    leading_dense_layers,
    num_layers,
    windowed_layers,
)
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.require("use_qk_norm", True, None)
    return decoder(
        config,
        "dots1",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            qk_norm="head",
            biases="all" if config.flag("attention_bias") else "none",
            **_windows(config),
        ),
        experts=Experts(**routed_and_shared(config), router=corrected_router(config, absent_groups=1)),
        dense_layers=leading_dense_layers(config),
    )


def _windows(config: CheckpointConfig) -> dict[str, Any]:
    """The window fields of AttentionShape; without `layer_types`, windows begin at layer `max_window_layers`."""
    config.ignore("max_window_layers")
    if not config.has("sliding_window"):
        return {}
    if config.has("layer_types"):
        layers = windowed_layers(config)
    else:
        layers = tuple(range(config.integer("max_window_layers"), num_layers(config)))
    return {"window": config.integer("sliding_window"), "windowed_layers": layers}


DOTS1 = Family(model_type="dots1", architecture=_architecture, names=DECODER_NAMES)
