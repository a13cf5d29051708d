"""moempi: inference of Mixture-of-Experts language models over MPI, the same program on CPUs and GPUs.

Shape letters in docstrings: T tokens (rows) of a step, D model width, H attention heads, E experts of a layer, K
experts chosen per token, F expert width, L layers, V vocabulary size, R ranks of a communicator, P physical experts of
a layer (every replica of an expert is one), N rows that need logits.

A lane is a slot of a stage in which micro-batches follow each other, with communicators and buffers of its own. A stage
has several lanes, so that one computes while the rows of others are on the network.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {"LLM": "moempi.api.llm", "SamplingParams": "moempi.api.sampling_params"}
_LAZY |= {"Results": "moempi.storage.reader"}


def __getattr__(name: str) -> Any:
    """Import what scripts use when they use it: commands do not wait for it."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
