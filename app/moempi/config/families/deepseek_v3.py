"""DeepSeek-V3 and -R1, Moonlight, Kimi-K2: latent attention, sigmoid router with a correction, shared experts.

Conversion leaves out the layers for multi-token prediction.
"""

from dataclasses import replace

from moempi.config.architecture import Architecture
from moempi.config.families._deepseek import DEEPSEEK_NAMES, corrected_router, deepseek
from moempi.config.families._family import Family
from moempi.config.families._reading import CheckpointConfig


def _architecture(config: CheckpointConfig) -> Architecture:
    return deepseek(config, "deepseek_v3", router=corrected_router(config))


DEEPSEEK_V3 = Family(model_type="deepseek_v3", architecture=_architecture, names=DEEPSEEK_NAMES, more_layers=True)
KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2")
