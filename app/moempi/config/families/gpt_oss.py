"""gpt-oss (gpt-oss-20b, gpt-oss-120b): attention sinks, windows in every other layer, biased experts, clamped SwiGLU.

Conversion dequantizes expert weights in blocks of 4-bit numbers. The checkpoint alternates gate and up rows.
"""

from dataclasses import replace

from moempi.config.architecture import Architecture, Clamp, Experts, Router
from moempi.config.families._decoder import decoder, heads
from moempi.config.families._family import DECODER_NAMES, Family, Fused, in_layers
from moempi.config.families._quantization import MXFP4
from moempi.config.families._reading import CheckpointConfig, head_dim, windowed_layers
from moempi.config.families._rope import read_rope


def _architecture(config: CheckpointConfig) -> Architecture:
    config.ignore("initial_context_length")  # what rope_scaling has too
    return decoder(
        config,
        "gpt_oss",
        attention=heads(
            config,
            rope=read_rope(config, dim=head_dim(config)),
            biases="all" if config.flag("attention_bias") else "none",
            sinks=True,
            window=config.integer("sliding_window"),
            windowed_layers=windowed_layers(config),
        ),
        experts=Experts(
            num=config.integer("num_local_experts", "num_experts"),
            width=config.integer("intermediate_size"),
            router=Router(
                top_k=config.integer("num_experts_per_tok", "experts_per_token"), scoring="softmax_chosen", bias=True
            ),
            biases=True,
            clamp=Clamp(
                alpha=config.constant("swiglu_alpha", absent=1.702),
                limit=config.constant("swiglu_limit", absent=7.0),
            ),
        ),
        norm="rms_float32",
    )


_GATE_UP = Fused("mlp.experts.gate_up_proj", parts=2, alternating=True, inputs_first=True)

GPT_OSS = Family(
    model_type="gpt_oss",
    architecture=_architecture,
    names=DECODER_NAMES
    | in_layers(
        {
            "router": "mlp.router.weight",
            "router_bias": "mlp.router.bias",
            "experts/gate": replace(_GATE_UP, part=0),
            "experts/up": replace(_GATE_UP, part=1),
            "experts/down": Fused("mlp.experts.down_proj", inputs_first=True),
            "experts/gate_bias": replace(_GATE_UP, name="mlp.experts.gate_up_proj_bias", part=0),
            "experts/up_bias": replace(_GATE_UP, name="mlp.experts.gate_up_proj_bias", part=1),
            "experts/down_bias": Fused("mlp.experts.down_proj_bias"),
        }
    ),
    fused_names={},
    quantizations=MXFP4,
)
