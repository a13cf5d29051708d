"""DeepSeek-V3 and -R1, Moonlight, Kimi-K2: latent attention, sigmoid router with a correction, shared experts.

Conversion dequantizes weights in blocks of 8-bit numbers and leaves out the layers for multi-token prediction.
"""

from dataclasses import replace

from moempi.config.architecture import Architecture
from moempi.config.families._deepseek import DEEPSEEK_NAMES, corrected_router, deepseek
from moempi.config.families._family import Family
from moempi.config.families._reading import CheckpointConfig


def _architecture(config: CheckpointConfig) -> Architecture:
    quantization = config.section("quantization_config")
    if quantization:
        quantization.require("quant_method", "fp8")
        quantization.require("fmt", "e4m3", None)
        quantization.require("weight_block_size", [128, 128])
    return deepseek(config, "deepseek_v3", router=corrected_router(config))


DEEPSEEK_V3 = Family(model_type="deepseek_v3", architecture=_architecture, names=DEEPSEEK_NAMES, more_layers=True)
KIMI_K2 = replace(DEEPSEEK_V3, model_type="kimi_k2")
