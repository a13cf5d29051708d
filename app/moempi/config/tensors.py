"""The catalogue: every tensor of a model, in the layout of the weight file.

A rank's share of a tensor is a range of rows (axis 0), and `Share` is the dimension along which rows are divided.
Therefore matrices that map a divided dimension back to the model width are stored transposed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from math import prod

from moempi.config.architecture import (
    Architecture,
    AttentionShape,
    DeltaRule,
    Indexer,
    Latent,
    StateSpace,
)

BLOCK_ROWS = 64
"""Default number of rows per checksum."""

PAGE_ROWS = 64
"""Positions in a page of the key-value cache."""


class Share(Enum):
    """The dimension along which ranks divide the rows of a tensor; ALL is not divided."""

    ALL = "all"
    HEADS = "heads"
    KV_HEADS = "kv_heads"
    HIDDEN = "hidden"
    VOCABULARY = "vocabulary"
    EXPERTS = "experts"


TENSOR_PARALLEL = (Share.HEADS, Share.KV_HEADS, Share.HIDDEN, Share.VOCABULARY)
"""The dimensions that a tensor group divides."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """One dataset of a weight file; `shape` is the stored shape and `block_rows` the number of rows per checksum.

    If `transposed`, the dataset is the transpose of the checkpoint's (outputs, inputs) matrix.
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


@lru_cache(maxsize=4)
def catalogue(architecture: Architecture) -> tuple[Tensor, ...]:
    """All tensors of a model, in the order of the forward pass."""
    width, vocab = architecture.width, architecture.vocab_size
    tensors = [Tensor("embedding", (vocab, width))]
    for layer in range(architecture.num_layers):
        tensors.extend(layer_tensors(architecture, layer))
    tensors.extend(_norm(architecture, "norm"))
    if not architecture.tied_embeddings:
        tensors.append(Tensor("head", (vocab, width), Share.VOCABULARY))
    if architecture.head_bias:
        tensors.append(Tensor("head_bias", (vocab,), Share.VOCABULARY))
    return tuple(tensors)


@lru_cache(maxsize=1 << 10)
def stage_tensors(architecture: Architecture, layers: range) -> tuple[Tensor, ...]:
    """The tensors of a stage: those of its layers, the embedding in the first stage, norm and head in the last.

    A tied embedding appears again as the head.
    """
    return tuple(_stage_tensors(architecture, layers))


def _stage_tensors(architecture: Architecture, layers: range) -> Iterator[Tensor]:
    is_first, is_last = layers.start == 0, layers.stop == architecture.num_layers
    for tensor in catalogue(architecture):
        group, _, rest = tensor.name.partition("/")
        if rest:
            if int(rest.partition("/")[0]) in layers:
                yield tensor
        elif group == "embedding":
            if is_first:
                yield tensor
            if is_last and architecture.tied_embeddings:
                yield Tensor("head", tensor.shape, Share.VOCABULARY)
        elif is_last:
            yield tensor


def layer_tensors(architecture: Architecture, layer: int) -> Iterator[Tensor]:
    """The tensors of one layer."""
    path, width, gated = layer_path(layer), architecture.width, architecture.activation == "swiglu"
    if architecture.has_attention(layer):
        yield from _norm(architecture, f"{path}/attention_norm")
        yield from _mixer_tensors(architecture, layer, path)
    if architecture.has_feed_forward(layer):
        yield from _norm(architecture, f"{path}/feed_forward_norm")
    if architecture.is_moe(layer):
        yield from _expert_tensors(architecture, path, gated=gated)
    elif architecture.has_feed_forward(layer):
        yield from _network(f"{path}/dense", architecture.dense_width, width, Share.HIDDEN, gated=gated)


def _mixer_tensors(architecture: Architecture, layer: int, path: str) -> Iterator[Tensor]:
    """Of the attention of a layer, or of what is in its place."""
    width = architecture.width
    if architecture.delta_rule and architecture.has_state(layer):
        yield from _delta_tensors(architecture.delta_rule, width, f"{path}/delta")
    elif architecture.state_space and architecture.has_state(layer):
        yield from _state_space_tensors(architecture.state_space, width, f"{path}/state_space")
    elif architecture.attention.latent:
        yield from _latent_tensors(architecture.attention, architecture.attention.latent, width, f"{path}/attention")
        if architecture.attention.indexer and architecture.has_indexer(layer):
            rank = architecture.attention.latent.query_rank
            yield from _indexer_tensors(architecture.attention.indexer, width, rank, f"{path}/attention")
    else:
        yield from _attention_tensors(architecture, f"{path}/attention")


def _norm(architecture: Architecture, name: str) -> Iterator[Tensor]:
    yield Tensor(name, (architecture.width,), dtype=_norm_type(architecture))
    if architecture.norm == "layer":
        yield Tensor(f"{name}_bias", (architecture.width,))


def _norm_type(architecture: Architecture) -> str:
    return "float32" if architecture.float32_norms else "bfloat16"


def _attention_tensors(architecture: Architecture, path: str) -> Iterator[Tensor]:
    heads, width, norm_type = architecture.attention, architecture.width, _norm_type(architecture)
    rows, kv_rows, dim = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim, heads.head_dim
    yield Tensor(f"{path}/q", (rows, width), Share.HEADS, block_rows=dim)
    yield Tensor(f"{path}/k", (kv_rows, width), Share.KV_HEADS, block_rows=dim)
    yield Tensor(f"{path}/v", (kv_rows, width), Share.KV_HEADS, block_rows=dim)
    if heads.biases != "none":
        yield Tensor(f"{path}/q_bias", (rows,), Share.HEADS, block_rows=dim)
        yield Tensor(f"{path}/k_bias", (kv_rows,), Share.KV_HEADS, block_rows=dim)
        yield Tensor(f"{path}/v_bias", (kv_rows,), Share.KV_HEADS, block_rows=dim)
    if heads.output_gate:
        yield Tensor(f"{path}/gate", (rows, width), Share.HEADS, block_rows=dim)
    yield from _output_tensors(heads, width, path)
    if heads.sinks:
        yield Tensor(f"{path}/sinks", (heads.num_heads,), Share.HEADS, block_rows=1)
    if heads.qk_norm == "head":
        yield Tensor(f"{path}/q_norm", (dim,), dtype=norm_type)
        yield Tensor(f"{path}/k_norm", (dim,), dtype=norm_type)
    if heads.qk_norm == "vector":
        yield Tensor(f"{path}/q_norm", (rows,), Share.HEADS, block_rows=dim, dtype=norm_type)
        yield Tensor(f"{path}/k_norm", (kv_rows,), Share.KV_HEADS, block_rows=dim, dtype=norm_type)


def _delta_tensors(rule: DeltaRule, width: int, path: str) -> Iterator[Tensor]:
    """Value heads are in the order of their key heads, so that a part of all rows has whole key heads."""
    shared, heads = rule.num_value_heads // rule.num_key_heads, rule.num_value_heads
    key_rows, value_rows = rule.num_key_heads * rule.key_dim, heads * rule.value_dim
    of_keys, of_values = (key_rows, rule.key_dim), (value_rows, shared * rule.value_dim)
    for name, (rows, block) in (("q", of_keys), ("k", of_keys), ("v", of_values)):
        yield Tensor(f"{path}/{name}", (rows, width), Share.HEADS, block_rows=block)
        yield Tensor(f"{path}/{name}_taps", (rows, rule.taps), Share.HEADS, block_rows=block)
    yield Tensor(f"{path}/z", (value_rows, width), Share.HEADS, block_rows=shared * rule.value_dim)
    yield Tensor(f"{path}/beta", (heads, width), Share.HEADS, block_rows=shared)
    yield Tensor(f"{path}/decay", (heads, width), Share.HEADS, block_rows=shared)
    yield Tensor(f"{path}/decay_log", (heads,), Share.HEADS, block_rows=shared, dtype="float32")
    yield Tensor(f"{path}/decay_bias", (heads,), Share.HEADS, block_rows=shared, dtype="float32")
    yield Tensor(f"{path}/norm", (rule.value_dim,), dtype="float32")
    yield Tensor(f"{path}/o", (value_rows, width), Share.HEADS, block_rows=rule.value_dim, transposed=True)


def _state_space_tensors(space: StateSpace, width: int, path: str) -> Iterator[Tensor]:
    """Heads are in the order of their groups, so that a part of all rows has whole groups."""
    shared, heads = space.num_heads // space.num_groups, space.num_heads
    of_heads = heads * space.head_dim, shared * space.head_dim
    of_groups = space.num_groups * space.state_dim, space.state_dim
    yield Tensor(f"{path}/z", (of_heads[0], width), Share.HEADS, block_rows=of_heads[1])
    for name, (rows, block) in (("x", of_heads), ("b", of_groups), ("c", of_groups)):
        yield Tensor(f"{path}/{name}", (rows, width), Share.HEADS, block_rows=block)
        yield Tensor(f"{path}/{name}_taps", (rows, space.taps), Share.HEADS, block_rows=block)
        yield Tensor(f"{path}/{name}_taps_bias", (rows,), Share.HEADS, block_rows=block)
    yield Tensor(f"{path}/step", (heads, width), Share.HEADS, block_rows=shared)
    for name in ("decay_log", "step_bias", "skip"):
        yield Tensor(f"{path}/{name}", (heads,), Share.HEADS, block_rows=shared, dtype="float32")
    yield Tensor(f"{path}/norm", (of_heads[0],), Share.HEADS, block_rows=of_heads[1])
    yield Tensor(f"{path}/o", (of_heads[0], width), Share.HEADS, block_rows=of_heads[1], transposed=True)


def _latent_tensors(heads: AttentionShape, latent: Latent, width: int, path: str) -> Iterator[Tensor]:
    rank, biased, rows = latent.key_value_rank, heads.biases == "all", heads.num_heads * heads.head_dim
    if latent.query_rank:
        yield from _latent_vector(f"{path}/q_latent", latent.query_rank, latent.query_rank, width, biased=biased)
        yield Tensor(f"{path}/q_expand", (rows, latent.query_rank), Share.HEADS, block_rows=heads.head_dim)
    else:
        yield Tensor(f"{path}/q", (rows, width), Share.HEADS, block_rows=heads.head_dim)
    yield from _latent_vector(f"{path}/kv_latent", rank + latent.rope_dim, rank, width, biased=biased)
    expanded = heads.head_dim - latent.rope_dim + latent.value_dim
    yield Tensor(f"{path}/kv_expand", (heads.num_heads * expanded, rank), Share.HEADS, block_rows=expanded)
    yield from _output_tensors(heads, width, path)


def _indexer_tensors(indexer: Indexer, width: int, query_rank: int, path: str) -> Iterator[Tensor]:
    """Undivided: every rank of a tensor group computes all scores, so that all choose the same positions."""
    yield Tensor(f"{path}/index_q", (indexer.num_heads * indexer.head_dim, query_rank))
    yield Tensor(f"{path}/index_k", (indexer.head_dim, width))
    yield Tensor(f"{path}/index_k_norm", (indexer.head_dim,))
    yield Tensor(f"{path}/index_k_norm_bias", (indexer.head_dim,))
    yield Tensor(f"{path}/index_weights", (indexer.num_heads, width), dtype="float32")


def _latent_vector(name: str, rows: int, normed: int, width: int, *, biased: bool) -> Iterator[Tensor]:
    yield Tensor(name, (rows, width))
    if biased:
        yield Tensor(f"{name}_bias", (rows,))
    yield Tensor(f"{name}_norm", (normed,))


def _output_tensors(heads: AttentionShape, width: int, path: str) -> Iterator[Tensor]:
    rows = heads.num_heads * heads.value_dim
    yield Tensor(f"{path}/o", (rows, width), Share.HEADS, block_rows=heads.value_dim, transposed=True)
    if heads.biases == "all":
        yield Tensor(f"{path}/o_bias", (width,))


def _expert_tensors(architecture: Architecture, path: str, *, gated: bool) -> Iterator[Tensor]:
    experts, width, routed = architecture.experts, architecture.width, architecture.routed_width
    num, hidden, router = experts.num, experts.width, experts.router
    yield Tensor(f"{path}/router", (num, width), dtype="float32" if router.float32_logits else "bfloat16")
    if router.bias:
        yield Tensor(f"{path}/router_bias", (num,))
    if router.correction:
        yield Tensor(f"{path}/router_correction", (num,), dtype="float32")
    if experts.latent_width:
        yield Tensor(f"{path}/latent/down", (routed, width))
        yield Tensor(f"{path}/latent/up", (width, routed))
    if gated:
        yield Tensor(f"{path}/experts/gate", (num, hidden, routed), Share.EXPERTS, block_rows=1)
    yield Tensor(f"{path}/experts/up", (num, hidden, routed), Share.EXPERTS, block_rows=1)
    yield Tensor(f"{path}/experts/down", (num, routed, hidden), Share.EXPERTS, block_rows=1)
    if experts.biases:
        yield Tensor(f"{path}/experts/gate_bias", (num, hidden), Share.EXPERTS, block_rows=1)
        yield Tensor(f"{path}/experts/up_bias", (num, hidden), Share.EXPERTS, block_rows=1)
        yield Tensor(f"{path}/experts/down_bias", (num, routed), Share.EXPERTS, block_rows=1)
    if experts.shared_width:
        yield from _network(f"{path}/shared", experts.shared_width, width, Share.ALL, gated=gated)
    if experts.shared_gate:
        yield Tensor(f"{path}/shared_gate", (1, width))


def _network(path: str, hidden: int, width: int, share: Share, *, gated: bool) -> Iterator[Tensor]:
    if gated:
        yield Tensor(f"{path}/gate", (hidden, width), share)
    yield Tensor(f"{path}/up", (hidden, width), share)
    yield Tensor(f"{path}/down", (hidden, width), share, transposed=True)
