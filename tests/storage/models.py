"""A small architecture with every kind of tensor, and its weights; each value encodes its tensor and position."""

from pathlib import Path

import numpy as np

from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.tensors import Tensor, catalogue
from moempi.storage.chat_templates import ChatTemplates
from moempi.storage.weights import write_weights
from storage.checkpoints import origin_bits

SMALL = Architecture(
    family="qwen3_moe",
    vocab_size=150,
    width=8,
    num_layers=3,
    max_positions=32,
    attention=AttentionShape(num_heads=4, num_kv_heads=2, head_dim=4, qk_norm="head"),
    experts=Experts(num=3, width=6, router=Router(top_k=2)),
    dense_layers=(0,),
    dense_width=70,
)


def origin_values(tensor: Tensor) -> np.ndarray:
    """The whole tensor as `write_model` writes it."""
    return origin_bits(tensor.name, tensor.shape)


def write_model(
    path: Path,
    architecture: Architecture = SMALL,
    *,
    tokenizer: str = '{"é": 1}',
    chat: ChatTemplates | None = None,
    step: int = 17,
) -> str:
    """Write every tensor in pieces of `step` rows; returns the fingerprint."""
    tensors = ((tensor, pieces(tensor, step)) for tensor in catalogue(architecture))
    return write_weights(path, architecture, tokenizer=tokenizer, chat=chat, tensors=tensors)


def pieces(tensor: Tensor, step: int) -> list[np.ndarray]:
    """The tensor cut into pieces of `step` rows."""
    return [origin_values(tensor)[start : start + step] for start in range(0, tensor.shape[0], step)]
