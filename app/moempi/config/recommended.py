"""The sampling rules that the maker of a model recommends in generation_config.json."""

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from moempi.config.job import Sampling

KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def recommended_sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """The keys of `[sampling]` in a generation_config.json; without `do_sample` the temperature is 0.

    A value that `[sampling]` does not take, as a negative `top_k`, is left out. Empty if nothing is recommended.
    """
    found = {key: generation[key] for key in KEYS if _is_valid(key, generation.get(key))}
    if generation.get("do_sample") is True:
        return {"temperature": 1.0} | found
    penalty = {key: value for key, value in found.items() if key == "repetition_penalty"}
    return {"temperature": 0.0} | penalty if penalty else {}


def with_recommended(sampling: Sampling, recommended: Mapping[str, float], *, given: Collection[str]) -> Sampling:
    """The sampling with the recommended values of keys that are not `given`; raises ValueError if one is wrong."""
    values = {key: value for key, value in recommended.items() if key in KEYS and key not in given}
    return msgspec.convert(msgspec.to_builtins(sampling) | values, Sampling, str_keys=True)


def _is_valid(key: str, value: Any) -> bool:
    try:
        msgspec.convert({key: value}, Sampling)
    except (ValueError, OverflowError, RecursionError):
        return False
    return True
