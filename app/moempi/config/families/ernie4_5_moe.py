"""Ernie-4.5-MoE (ERNIE-4.5-21B-A3B, -300B-A47B): interleaved rotation, softmax router with a correction in float32."""

from moempi.config.architecture import Architecture, Experts, Router
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._family import DECODER_NAMES, FUSED_NAMES, Family, in_layers
from moempi.config.families._reading import CheckpointConfig, head_dim, num_layers
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("use_bias", "sliding_window")
    config.require("moe_gate", "topk", None)
    config.require("moe_use_aux_free", True, None)
    config.require("use_rmsnorm", True, None)
    width = config.integer("moe_intermediate_size")
    return decoder(
        config,
        "ernie4_5_moe",
        attention=heads(config, rope=read_rope(config, dim=head_dim(config), interleaved=True)),
        experts=Experts(
            num=config.integer("moe_num_experts", "num_experts", "num_local_experts"),
            width=width,
            router=Router(
                top_k=config.integer("moe_k", "num_experts_per_tok"),
                correction=True,
                renormalize=True,
                least_sum=config.constant("moe_norm_min", absent=1e-12),
                float32_logits=True,
            ),
            shared_width=config.integer("moe_num_shared_experts") * width,
        ),
        dense_layers=_dense_layers(config),
    )


def _dense_layers(config: CheckpointConfig) -> tuple[int, ...]:
    """Layers outside `moe_layer_start_index` to `moe_layer_end_index` (-1: the last), or skipped by the interval."""
    layers, step = num_layers(config), config.integer("moe_layer_interval")
    first, last = config.integer("moe_layer_start_index"), config.integer("moe_layer_end_index")
    if step < 1:
        raise config.error(f"moe_layer_interval is {step}, not a positive number")
    last = layers - 1 if last == -1 else last
    return tuple(layer for layer in range(layers) if (layer + 1) % step or not first <= layer <= last)


ERNIE4_5_MOE = Family(
    model_type="ernie4_5_moe",
    architecture=_architecture,
    names=DECODER_NAMES | in_layers({"router_correction": "mlp.moe_statics.e_score_correction_bias"}),
    fused_names=FUSED_NAMES | in_layers({"router_correction": "mlp.gate.moe_statics.e_score_correction_bias"}),
    left_out=r"^model\.mtp_",
)
