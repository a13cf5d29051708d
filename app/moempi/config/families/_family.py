"""A model family: a reader of its config.json, and the names of its tensors."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from moempi.config.architecture import Architecture
from moempi.config.families._quantization import METHODS
from moempi.config.families._reading import CheckpointConfig
from moempi.config.tensors import Tensor

_LAYER = re.compile(r"^layers/(\d+)/")
_THEIR_LAYER = re.compile(r"^model\.layers\.(\d{1,9})\.")
# Frequencies follow from the configuration; activations and the cache are not quantized.
_UNUSED = re.compile(r"\.rotary_emb\.inv_freq$|\.input_(?:global_)?scale$|\.[kv]_scale$")


@dataclass(frozen=True, slots=True)
class Fused:
    """The `part`-th of `parts` equal parts of each expert's outputs in a checkpoint's tensor that holds all experts.

    Each part is a range of outputs, or every `parts`-th output if `alternating`. The tensor holds each expert's matrix
    as (outputs, inputs), or as (inputs, outputs) if `inputs_first`.
    """

    name: str
    part: int = 0
    parts: int = 1
    alternating: bool = False
    inputs_first: bool = False

    def outputs(self, num_outputs: int) -> slice:
        """The outputs of this part among `num_outputs`, a multiple of `parts`."""
        if self.alternating:
            return slice(self.part, None, self.parts)
        size = num_outputs // self.parts
        return slice(self.part * size, (self.part + 1) * size)


@dataclass(frozen=True, slots=True)
class Rows:
    """The `part`-th part of each group of rows of a checkpoint's tensor.

    The rows are equal groups, one after another; `parts` gives the number of rows of each part of a group.
    """

    name: str
    part: int
    parts: Callable[[Architecture], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class OnePlus:
    """1 plus each number of a checkpoint's tensor, in float32."""

    name: str


Derived = Fused | Rows | OnePlus
Names = dict[str, str | Derived]
Sources = tuple[str, ...] | Derived
"""The checkpoint's names of one of our tensors: one name, one name per expert (row), or what its values are made of."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family of checkpoints.

    `architecture` reads a checkpoint's configuration and raises DataError for unsupported options. `names` maps our
    tensor names to the checkpoint's, both with `{layer}`; a name with `{expert}` is one matrix per expert, which our
    tensor stacks. `fused_names` are the names that differ where transformers 5 saved the experts of a layer as one
    tensor. `quantizations` are the values of `quant_method` that can be converted. `left_out` is a regular expression
    of the checkpoint's tensors that the model does not need. With `more_layers`, layers after the model's predict
    further tokens, as many as the configuration says, and are left out too.
    """

    model_type: str
    architecture: Callable[[CheckpointConfig], Architecture]
    names: Names
    fused_names: Names = field(default_factory=lambda: FUSED_NAMES)
    quantizations: tuple[str, ...] = METHODS
    more_layers: bool = False
    left_out: str | None = None

    def sources(self, tensor: Tensor) -> Sources:
        """The names of `tensor` in the checkpoints of the hub."""
        return _sources(self.names[_in_any_layer(tensor.name)], tensor)

    def fused_sources(self, tensor: Tensor) -> Sources | None:
        """The names of `tensor` in a checkpoint with fused experts, None if they are no others."""
        pattern = self.fused_names.get(_in_any_layer(tensor.name))
        return None if pattern is None else _sources(pattern, tensor)

    def leaves_out(self, name: str, *, predicting: range) -> bool:
        """Whether the checkpoint's tensor `name` is not part of the model; `predicting` layers are not."""
        layer = _THEIR_LAYER.match(name)
        if _UNUSED.search(name) or (self.more_layers and layer and int(layer[1]) in predicting):
            return True
        return bool(self.left_out and re.search(self.left_out, name))


def _in_any_layer(name: str) -> str:
    return _LAYER.sub("layers/{layer}/", name)


def _sources(pattern: str | Derived, tensor: Tensor) -> Sources:
    layer = _LAYER.match(tensor.name)
    number = int(layer[1]) if layer else None
    if not isinstance(pattern, str):
        return replace(pattern, name=pattern.name.format(layer=number))
    if "{expert}" in pattern:
        return tuple(pattern.format(layer=number, expert=expert) for expert in range(tensor.shape[0]))
    return (pattern.format(layer=number),)


_LAYER_NAMES = {
    "attention_norm": "input_layernorm.weight",
    "attention_norm_bias": "input_layernorm.bias",
    "attention/q": "self_attn.q_proj.weight",
    "attention/k": "self_attn.k_proj.weight",
    "attention/v": "self_attn.v_proj.weight",
    "attention/o": "self_attn.o_proj.weight",
    "attention/q_bias": "self_attn.q_proj.bias",
    "attention/k_bias": "self_attn.k_proj.bias",
    "attention/v_bias": "self_attn.v_proj.bias",
    "attention/o_bias": "self_attn.o_proj.bias",
    "attention/q_norm": "self_attn.q_norm.weight",
    "attention/k_norm": "self_attn.k_norm.weight",
    "attention/sinks": "self_attn.sinks",
    "feed_forward_norm": "post_attention_layernorm.weight",
    "feed_forward_norm_bias": "post_attention_layernorm.bias",
    "dense/gate": "mlp.gate_proj.weight",
    "dense/up": "mlp.up_proj.weight",
    "dense/down": "mlp.down_proj.weight",
    "router": "mlp.gate.weight",
    "router_correction": "mlp.gate.e_score_correction_bias",
    "experts/gate": "mlp.experts.{expert}.gate_proj.weight",
    "experts/up": "mlp.experts.{expert}.up_proj.weight",
    "experts/down": "mlp.experts.{expert}.down_proj.weight",
    "shared/gate": "mlp.shared_experts.gate_proj.weight",
    "shared/up": "mlp.shared_experts.up_proj.weight",
    "shared/down": "mlp.shared_experts.down_proj.weight",
}


def in_layers(names: Mapping[str, str | Derived]) -> Names:
    """Full names on both sides from names inside a layer; the checkpoint's begin with `model.layers.N`."""
    return {
        f"layers/{{layer}}/{ours}": f"model.layers.{{layer}}.{theirs}"
        if isinstance(theirs, str)
        else replace(theirs, name=f"model.layers.{{layer}}.{theirs.name}")
        for ours, theirs in names.items()
    }


DECODER_NAMES: Names = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "norm_bias": "model.norm.bias",
    "head": "lm_head.weight",
    "head_bias": "lm_head.bias",
    **in_layers(_LAYER_NAMES),
}
"""The names in most decoder families on the hub."""

MIXTRAL_NAMES: Names = DECODER_NAMES | in_layers(
    {
        "router": "block_sparse_moe.gate.weight",
        "experts/gate": "block_sparse_moe.experts.{expert}.w1.weight",
        "experts/up": "block_sparse_moe.experts.{expert}.w3.weight",
        "experts/down": "block_sparse_moe.experts.{expert}.w2.weight",
    }
)
"""The names in Mixtral and Phi-MoE."""

FUSED_NAMES: Names = in_layers(
    {
        "experts/gate": Fused("mlp.experts.gate_up_proj", part=0, parts=2),
        "experts/up": Fused("mlp.experts.gate_up_proj", part=1, parts=2),
        "experts/down": Fused("mlp.experts.down_proj"),
    }
)
"""The names of fused experts as transformers 5 saves them with `save_original_format=False`."""
