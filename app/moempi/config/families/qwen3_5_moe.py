"""Qwen3.5-MoE and its successors (Qwen3.5-35B-A3B, Qwen3.5-397B-A17B, Qwen3.6-35B-A3B), text: gated delta rule."""

from moempi.config.architecture import Architecture
from moempi.config.families._family import DECODER_NAMES, Family
from moempi.config.families._gated_delta import GATED_DELTA_NAMES, PREDICTED_TOKENS, SEPARATE_NAMES, gated_delta
from moempi.config.families._reading import CheckpointConfig


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("mlp_only_layers")
    config.require("decoder_sparse_step", 1, None)
    config.require("norm_topk_prob", True, None)
    return gated_delta(config, "qwen3_5_moe", renormalize=True)


QWEN3_5_MOE_TEXT = Family(
    model_type="qwen3_5_moe_text",
    architecture=_architecture,
    names=DECODER_NAMES | GATED_DELTA_NAMES | SEPARATE_NAMES,
    left_out=PREDICTED_TOKENS,
)
