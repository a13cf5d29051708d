"""A checkpoint that spells: after each token of a text, its most likely token is the next one of the text."""

from pathlib import Path

import numpy as np

from engine import chats
from moempi.engine.tokenizer import TextTokenizer
from storage.checkpoints import QWEN3_MOE, tensor_shapes, write_checkpoint

SIZES = {
    "num_hidden_layers": 2,
    "mlp_only_layers": [],
    "hidden_size": 272,
    "vocab_size": 272,
    "eos_token_id": 271,
    "max_position_embeddings": 4096,
}
ONE = 0x3F80  # in bfloat16


def write_speller(folder: Path, style: str, text: str) -> list[int]:
    """Write a checkpoint with the tokenizer and chat template of a style; returns the tokens of the text.

    No token may have two successors. The layers add nothing to the embeddings, which are the rows of a unit matrix.
    """
    tokens = TextTokenizer(chats.tokenizer_text(style), eos_tokens=()).encode_chat(text)
    assert len(set(tokens[:-1])) == len(tokens) - 1
    tensors = {name: np.zeros(shape, "<u2") for name, shape in tensor_shapes(QWEN3_MOE | SIZES).items()}
    np.fill_diagonal(tensors["model.embed_tokens.weight"], ONE)
    tensors["model.norm.weight"][:] = ONE
    tensors["lm_head.weight"][tokens[1:], tokens[:-1]] = ONE
    write_checkpoint(folder, tensors={name: ("BF16", bits) for name, bits in tensors.items()}, **SIZES)
    chats.write_tokenizer(folder, style)
    return tokens
