"""The model families whose checkpoints can be converted, one file per family."""

from collections.abc import Mapping
from typing import Any

import msgspec

from moempi.config.architecture import Architecture
from moempi.config.families._family import Family, Fused, OnePlus, Rows, Sources
from moempi.config.families._harmless import HARMLESS
from moempi.config.families._quantization import Quantization, part_name, read_quantization
from moempi.config.families._reading import CheckpointConfig, num_predicting_layers
from moempi.config.families._wrapper import is_other_part, language_model, plain_name
from moempi.config.families.deepseek_v2 import DEEPSEEK_V2
from moempi.config.families.deepseek_v3 import DEEPSEEK_V3, KIMI_K2
from moempi.config.families.deepseek_v32 import DEEPSEEK_V32
from moempi.config.families.dots1 import DOTS1
from moempi.config.families.ernie4_5_moe import ERNIE4_5_MOE
from moempi.config.families.glm4_moe import GLM4_MOE
from moempi.config.families.glm4_moe_lite import GLM4_MOE_LITE
from moempi.config.families.glm_moe_dsa import GLM_MOE_DSA
from moempi.config.families.gpt_oss import GPT_OSS
from moempi.config.families.hy_v3 import HY_V3
from moempi.config.families.minimax_m2 import MINIMAX_M2
from moempi.config.families.mixtral import MIXTRAL
from moempi.config.families.nemotron_h import NEMOTRON_H
from moempi.config.families.olmoe import OLMOE
from moempi.config.families.phimoe import PHIMOE
from moempi.config.families.qwen2_moe import QWEN2_MOE
from moempi.config.families.qwen3_5_moe import QWEN3_5_MOE_TEXT
from moempi.config.families.qwen3_moe import QWEN3_MOE, QWEN3_VL_MOE_TEXT
from moempi.config.families.qwen3_next import QWEN3_NEXT
from moempi.config.families.sarvam_moe import SARVAM_MOE
from moempi.config.families.solar_open import SOLAR_OPEN
from moempi.errors import DataError

FAMILIES = {
    family.model_type: family
    for family in (
        QWEN3_MOE,
        QWEN3_VL_MOE_TEXT,
        OLMOE,
        MIXTRAL,
        DEEPSEEK_V3,
        KIMI_K2,
        DEEPSEEK_V2,
        GLM4_MOE,
        DOTS1,
        QWEN2_MOE,
        ERNIE4_5_MOE,
        PHIMOE,
        GPT_OSS,
        MINIMAX_M2,
        GLM4_MOE_LITE,
        DEEPSEEK_V32,
        GLM_MOE_DSA,
        HY_V3,
        SOLAR_OPEN,
        SARVAM_MOE,
        QWEN3_NEXT,
        QWEN3_5_MOE_TEXT,
        NEMOTRON_H,
    )
}


def _family(model_type: object, *, origin: str) -> Family:
    """The family of a `model_type`; raises DataError that begins with `origin` if it is unknown."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise DataError(f"{origin}: model_type {model_type!r} is not supported, only {known}")
    return FAMILIES[model_type]


def read_architecture(values: Mapping[str, Any], generation: Mapping[str, Any], *, origin: str) -> Architecture:
    """The architecture in a decoded config.json and generation_config.json ({} if there is none).

    Raises DataError that begins with `origin` for an unknown model type, a missing or impossible value, and an
    unsupported option that changes the arithmetic.
    """
    found, config = _language_model(values, generation, origin=origin)
    read_quantization(config, found.quantizations)
    unchecked = found.architecture(config)
    config.refuse_unknown(HARMLESS)
    try:
        architecture = msgspec.convert(msgspec.to_builtins(unchecked), Architecture)
    except msgspec.ValidationError as error:
        raise config.error(str(error)) from error
    problem = architecture.problem()
    if problem:
        raise config.error(problem)
    return architecture


def checkpoint_family(values: Mapping[str, Any], *, origin: str) -> Family:
    """The family of the language model in a decoded config.json; raises DataError if it is unknown."""
    return _language_model(values, {}, origin=origin)[0]


def checkpoint_quantization(values: Mapping[str, Any], *, origin: str) -> Quantization | None:
    """How a decoded config.json says that matrices are quantized, None if they are not; raises DataError."""
    found, config = _language_model(values, {}, origin=origin)
    return read_quantization(config, found.quantizations)


def checkpoint_predicting_layers(values: Mapping[str, Any], num_layers: int, *, origin: str) -> range:
    """The layers behind `num_layers` that predict further tokens, by a decoded config.json; raises DataError."""
    config = _language_model(values, {}, origin=origin)[1]
    return range(num_layers, num_layers + num_predicting_layers(config))


def _language_model(
    values: Mapping[str, Any], generation: Mapping[str, Any], *, origin: str
) -> tuple[Family, CheckpointConfig]:
    values, key = language_model(values)
    config = CheckpointConfig(values, generation, origin=f"{origin}: {key}" if key else origin)
    return _family(values.get("model_type"), origin=config.origin), config


__all__ = [
    "FAMILIES",
    "Family",
    "Fused",
    "OnePlus",
    "Quantization",
    "Rows",
    "Sources",
    "checkpoint_family",
    "checkpoint_predicting_layers",
    "checkpoint_quantization",
    "is_other_part",
    "part_name",
    "plain_name",
    "read_architecture",
]
