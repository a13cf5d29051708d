"""GLM-4.7-Flash: the latent attention, the router and the shared experts of DeepSeek-V3."""

from moempi.config.architecture import Architecture
from moempi.config.families._deepseek import DEEPSEEK_NAMES, corrected_router, deepseek
from moempi.config.families._family import Family
from moempi.config.families._reading import CheckpointConfig


def _architecture(config: CheckpointConfig) -> Architecture:
    return deepseek(config, "glm4_moe_lite", router=corrected_router(config))


GLM4_MOE_LITE = Family(model_type="glm4_moe_lite", architecture=_architecture, names=DEEPSEEK_NAMES, more_layers=True)
