"""The catalogue: every tensor that a model of some architecture has, as it lies in a weight file.

A rank's share of any tensor is a row range (axis 0), so `Share` says along what the rows may be divided. Matrices
that map a divided axis back to the model width are stored transposed for that reason (`transposed`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from math import prod

from moempi.config.architecture import Architecture

BLOCK_ROWS = 64
"""Rows of a tensor under one checksum, where nothing else divides it."""

PAGE_ROWS = 64
"""Positions in a page of the key-value cache."""


class Share(Enum):
    """What the rows of a tensor are divided by among ranks."""

    ALL = "all"
    HEADS = "heads"
    KV_HEADS = "kv_heads"
    HIDDEN = "hidden"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One dataset of a weight file: bfloat16 unless `dtype` says otherwise.

    `shape` is as stored; `block_rows` is the number of rows under one checksum; `transposed` says that the dataset
    holds the transpose of the (outputs, inputs) matrix that a checkpoint has.
    """

    name: str
    shape: tuple[int, ...]
    share: Share = Share.ALL
    block_rows: int = BLOCK_ROWS
    transposed: bool = False
    dtype: str = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Size of the dataset in bytes."""
        return prod(self.shape) * (2 if self.dtype == "bfloat16" else 4)

    @property
    def num_blocks(self) -> int:
        """Number of checksummed row blocks."""
        return -(-self.shape[0] // self.block_rows)


def layer_path(layer: int) -> str:
    """Group of a layer in the weight file: `layers/007`."""
    return f"layers/{layer:03d}"


def catalogue(architecture: Architecture) -> tuple[Tensor, ...]:
    """All tensors of a model, in the order of the forward pass."""
    width, vocab = architecture.width, architecture.vocab_size
    tensors = [Tensor("embedding", (vocab, width))]
    for layer in range(architecture.num_layers):
        tensors.extend(layer_tensors(architecture, layer))
    tensors.append(Tensor("norm", (width,)))
    if not architecture.tied_embeddings:
        tensors.append(Tensor("head", (vocab, width)))
    return tuple(tensors)


def stage_tensors(architecture: Architecture, layers: range) -> Iterator[Tensor]:
    """The tensors that ranks of a stage hold: those of its layers, and what stands before and after all layers."""
    is_first, is_last = layers.start == 0, layers.stop == architecture.num_layers
    for tensor in catalogue(architecture):
        group, _, rest = tensor.name.partition("/")
        if rest:
            if int(rest.partition("/")[0]) in layers:
                yield tensor
        elif is_last or (is_first and group == "embedding"):
            if group != "embedding" or is_first or architecture.tied_embeddings:
                yield tensor


def layer_tensors(architecture: Architecture, layer: int) -> Iterator[Tensor]:
    """The tensors of one layer."""
    path, width = layer_path(layer), architecture.width
    yield Tensor(f"{path}/attention_norm", (width,))
    yield from _attention_tensors(architecture, f"{path}/attention")
    yield Tensor(f"{path}/feed_forward_norm", (width,))
    if architecture.is_moe(layer):
        num, hidden = architecture.experts.num, architecture.experts.width
        yield Tensor(f"{path}/router", (num, width))
        yield Tensor(f"{path}/experts/gate", (num, hidden, width), Share.EXPERTS, block_rows=1)
        yield Tensor(f"{path}/experts/up", (num, hidden, width), Share.EXPERTS, block_rows=1)
        yield Tensor(f"{path}/experts/down", (num, width, hidden), Share.EXPERTS, block_rows=1)
    else:
        hidden = architecture.dense_width
        yield Tensor(f"{path}/dense/gate", (hidden, width), Share.HIDDEN)
        yield Tensor(f"{path}/dense/up", (hidden, width), Share.HIDDEN)
        yield Tensor(f"{path}/dense/down", (hidden, width), Share.HIDDEN, transposed=True)


def _attention_tensors(architecture: Architecture, path: str) -> Iterator[Tensor]:
    heads, width = architecture.attention, architecture.width
    rows, kv_rows, dim = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim, heads.head_dim
    yield Tensor(f"{path}/q", (rows, width), Share.HEADS, block_rows=dim)
    yield Tensor(f"{path}/k", (kv_rows, width), Share.KV_HEADS, block_rows=dim)
    yield Tensor(f"{path}/v", (kv_rows, width), Share.KV_HEADS, block_rows=dim)
    yield Tensor(f"{path}/o", (rows, width), Share.HEADS, block_rows=dim, transposed=True)
    if heads.qk_norm == "head":
        yield Tensor(f"{path}/q_norm", (dim,))
        yield Tensor(f"{path}/k_norm", (dim,))
