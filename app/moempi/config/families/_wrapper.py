"""Multimodal checkpoints around a language model: its configuration, and the names of its tensors."""

import re
from collections.abc import Mapping
from typing import Any

_OUTER_KEYS = ("bos_token_id", "eos_token_id")
_WHOLE_KEYS = ("tie_word_embeddings", "quantization_config")
_PREFIX = re.compile(r"^(?:model\.language_model\.|language_model\.(?:model\.)?)")
_OTHER_PARTS = re.compile(
    r"^(?:model\.)?(?:visual|vision_tower|vision_model|mm_projector|multi_modal_projector|audio_tower)\."
)


def language_model(values: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The configuration of the language model in a decoded config.json, and its key there, "" if it is the whole.

    A wrapper has it under `text_config`, and may have tokens outside of it. Head and files are the wrapper's, which
    therefore says first whether the embeddings are tied and how matrices are stored.
    """
    inner = values.get("text_config")
    if not isinstance(inner, dict):
        return values, ""
    keys = [*_WHOLE_KEYS, *(key for key in _OUTER_KEYS if inner.get(key) is None)]
    return inner | {key: values[key] for key in keys if values.get(key) is not None}, "text_config"


def plain_name(name: str) -> str:
    """The name that a tensor of the language model has without a wrapper."""
    prefix = _PREFIX.match(name)
    if prefix is None:
        return name
    rest = name[prefix.end() :]
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def is_other_part(name: str) -> bool:
    """Whether a tensor belongs to a part for images or sound."""
    return bool(_OTHER_PARTS.match(name))
