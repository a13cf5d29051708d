"""The sampling of a call."""

from typing import Any

import msgspec

from moempi.config.job import Sampling
from moempi.config.settings import read_sampling


class SamplingParams:
    """Keys of the job file's `[sampling]`, all but `defaults`: `SamplingParams(max_tokens=64, temperature=0.7)`.

    The keys that are not given are the LLM's settings. Raises ConfigError for an unknown key or a wrong value.
    """

    def __init__(self, **keys: Any) -> None:
        self._keys = read_sampling(keys, origin=type(self).__name__)

    def __repr__(self) -> str:
        return f"SamplingParams({', '.join(f'{key}={value!r}' for key, value in self._keys.items())})"

    def applied_to(self, sampling: Sampling) -> Sampling:
        """The sampling with these keys instead of its own."""
        return msgspec.structs.replace(sampling, **self._keys)
