"""What a model family is: a way to read its config.json, and where its tensors are called what."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moempi.config.architecture import Architecture
from moempi.config.families._reading import CheckpointConfig
from moempi.config.tensors import Tensor

_LAYER = re.compile(r"^layers/(\d+)/")


@dataclass(frozen=True, slots=True)
class Family:
    """A family of checkpoints.

    `architecture` reads a checkpoint's configuration and refuses what is not supported (DataError). `names` maps our
    tensor names to the checkpoint's, both with `{layer}`; a name with `{expert}` stands for one matrix an expert,
    stacked in ours.
    """

    model_type: str
    architecture: Callable[[CheckpointConfig], Architecture]
    names: Mapping[str, str]

    def sources(self, tensor: Tensor) -> tuple[str, ...]:
        """The checkpoint's names of what `tensor` holds: one name, or one an expert (row)."""
        layer = _LAYER.match(tensor.name)
        pattern = self.names[_LAYER.sub("layers/{layer}/", tensor.name)]
        number = int(layer[1]) if layer else None
        if "{expert}" in pattern:
            return tuple(pattern.format(layer=number, expert=expert) for expert in range(tensor.shape[0]))
        return (pattern.format(layer=number),)


DECODER_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "layers/{layer}/attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "layers/{layer}/attention/q": "model.layers.{layer}.self_attn.q_proj.weight",
    "layers/{layer}/attention/k": "model.layers.{layer}.self_attn.k_proj.weight",
    "layers/{layer}/attention/v": "model.layers.{layer}.self_attn.v_proj.weight",
    "layers/{layer}/attention/o": "model.layers.{layer}.self_attn.o_proj.weight",
    "layers/{layer}/feed_forward_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "layers/{layer}/dense/gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "layers/{layer}/dense/up": "model.layers.{layer}.mlp.up_proj.weight",
    "layers/{layer}/dense/down": "model.layers.{layer}.mlp.down_proj.weight",
    "layers/{layer}/router": "model.layers.{layer}.mlp.gate.weight",
    "layers/{layer}/experts/gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "layers/{layer}/experts/up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "layers/{layer}/experts/down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
"""The names that most decoder families on the hub share."""
