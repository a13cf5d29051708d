"""Nemotron-H with experts (Nemotron 3): each layer is Mamba-2, attention without rope, MoE or an MLP."""

from moempi.config.architecture import MAX_LAYERS, Architecture, AttentionShape, Experts, Rope, StateSpace
from moempi.config.families._deepseek import corrected_router
from moempi.config.families._family import Family, Fused, Names, Rows
from moempi.config.families._reading import CheckpointConfig, head_dim

_KINDS = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
_OLD_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}
_INITIAL = ("time_step_max", "time_step_floor", "rescale_prenorm_residual", "expand")
_OF_PROGRAMS = ("chunk_size", "num_logits_to_keep", "use_mamba_kernels", "moe_shared_expert_overlap")
_PREDICTED = ("mtp_hybrid_override_pattern", "mtp_layers_block_type")
_UNUSED_ROPE = ("rope_theta", "partial_rotary_factor", "rope_parameters", "rope_scaling")
_NO_LIMIT = [0.0, {"__float__": "Infinity"}]


def _architecture(config: CheckpointConfig) -> Architecture:
    kinds = _layer_kinds(config)
    _check_options(config)
    layers = {kind: tuple(layer for layer, of in enumerate(kinds) if of == kind) for kind in _KINDS.values()}
    mamba, dense = layers["linear_attention"], layers["mlp"]
    bos = config.tokens("bos_token_id")
    config.ignore("intermediate_size")
    return Architecture(
        family="nemotron_h",
        vocab_size=config.integer("vocab_size"),
        width=config.integer("hidden_size"),
        num_layers=len(kinds),
        max_positions=config.integer("max_position_embeddings"),
        attention=AttentionShape(
            num_heads=config.integer("num_attention_heads"),
            num_kv_heads=config.integer("num_key_value_heads"),
            head_dim=head_dim(config),
            rope=Rope(dim=2, none=True),
        ),
        experts=_experts(config),
        dense_layers=dense,
        dense_width=config.integer("intermediate_size") if dense else 0,
        norm="rms_float32",
        norm_eps=config.number("layer_norm_epsilon", "norm_eps"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        state_space=_state_space(config) if mamba else None,
        state_space_layers=mamba,
        without_attention=tuple(sorted(layers["moe"] + dense)),
        without_feed_forward=tuple(sorted(mamba + layers["full_attention"])),
        activation="relu2",
        bos_token=bos[0] if bos else None,
        eos_tokens=config.tokens("eos_token_id"),
    )


def _layer_kinds(config: CheckpointConfig) -> list[str]:
    """The kind of each layer: by `layers_block_type`, or by the letters of `hybrid_override_pattern`."""
    key = "layers_block_type" if config.has("layers_block_type") else "hybrid_override_pattern"
    if key == "layers_block_type":
        config.ignore("hybrid_override_pattern")
        kinds = [_OLD_KINDS.get(kind, kind) for kind in config.texts(key)]
    else:
        kinds = [_KINDS.get(letter, letter) for letter in config.text(key)]
    if not 1 <= len(kinds) <= MAX_LAYERS or not set(kinds) <= set(_KINDS.values()):
        raise config.error(f"{key} is not a known kind for each of 1 to {MAX_LAYERS} layers: {kinds}")
    config.require("num_hidden_layers", len(kinds), None)
    return kinds


def _check_options(config: CheckpointConfig) -> None:
    biases = ("attention_bias", "use_bias", "mlp_bias", "mamba_proj_bias")
    config.refuse("sliding_window", "residual_in_fp32", *biases)
    config.require("use_conv_bias", True)
    config.require("mlp_hidden_act", "relu2")
    config.require("mamba_hidden_act", "silu")
    config.require("mamba_ssm_cache_dtype", "float32", None)
    config.require("n_shared_experts", 1)
    config.require("time_step_limit", _NO_LIMIT, None)
    config.ignore(*_INITIAL, *_OF_PROGRAMS, *_PREDICTED, *_UNUSED_ROPE)


def _experts(config: CheckpointConfig) -> Experts:
    return Experts(
        num=config.integer("n_routed_experts", "num_local_experts"),
        width=config.integer("moe_intermediate_size"),
        router=corrected_router(config),
        shared_width=config.integer("moe_shared_expert_intermediate_size"),
        latent_width=_latent_width(config),
    )


def _latent_width(config: CheckpointConfig) -> int:
    """The width in which experts compute, 0 for that of the model."""
    if not config.has("moe_latent_size"):
        return 0
    width = config.integer("moe_latent_size")
    if not width:
        raise config.error("moe_latent_size is 0, not a width")
    return width


def _state_space(config: CheckpointConfig) -> StateSpace:
    """The step size of a position is at least `time_step_min`, which transformers applies to prompts alone."""
    return StateSpace(
        num_heads=config.integer("mamba_num_heads"),
        head_dim=config.integer("mamba_head_dim"),
        num_groups=config.integer("n_groups"),
        state_dim=config.integer("ssm_state_size"),
        taps=config.integer("conv_kernel"),
        least_step=config.number("time_step_min"),
    )


def _space_of(architecture: Architecture) -> StateSpace:
    if architecture.state_space is None:
        raise ValueError("the model has no state space")
    return architecture.state_space


def _mixed(architecture: Architecture) -> tuple[int, ...]:
    """The heads, and the inputs and outputs of the groups' states."""
    space = _space_of(architecture)
    groups = space.num_groups * space.state_dim
    return space.num_heads * space.head_dim, groups, groups


def _inputs(architecture: Architecture) -> tuple[int, ...]:
    """The output gates, what passes the convolution, and the steps."""
    space = _space_of(architecture)
    return space.num_heads * space.head_dim, *_mixed(architecture), space.num_heads


def _names(model: str, experts: dict[str, str | Fused]) -> Names:
    mixer = f"{model}.layers.{{layer}}.mixer"
    of_layer: Names = {
        "attention_norm": f"{model}.layers.{{layer}}.norm.weight",
        "feed_forward_norm": f"{model}.layers.{{layer}}.norm.weight",
        **{f"attention/{name}": f"{mixer}.{name}_proj.weight" for name in "qkvo"},
        **{
            f"state_space/{name}": Rows(f"{mixer}.in_proj.weight", part, _inputs)
            for part, name in enumerate(("z", "x", "b", "c", "step"))
        },
        **{f"state_space/{name}_taps": Rows(f"{mixer}.conv1d.weight", i, _mixed) for i, name in enumerate("xbc")},
        **{f"state_space/{name}_taps_bias": Rows(f"{mixer}.conv1d.bias", i, _mixed) for i, name in enumerate("xbc")},
        "state_space/decay_log": f"{mixer}.A_log",
        "state_space/step_bias": f"{mixer}.dt_bias",
        "state_space/skip": f"{mixer}.D",
        "state_space/norm": f"{mixer}.norm.weight",
        "state_space/o": f"{mixer}.out_proj.weight",
        **{f"dense/{name}": f"{mixer}.{name}_proj.weight" for name in ("up", "down")},
        "router": f"{mixer}.gate.weight",
        "router_correction": f"{mixer}.gate.e_score_correction_bias",
        "latent/down": f"{mixer}.fc1_latent_proj.weight",
        "latent/up": f"{mixer}.fc2_latent_proj.weight",
        **{f"shared/{name}": f"{mixer}.shared_experts.{name}_proj.weight" for name in ("up", "down")},
        **experts,
    }
    return {
        "embedding": f"{model}.embeddings.weight",
        "norm": f"{model}.norm_f.weight",
        "head": "lm_head.weight",
        **{f"layers/{{layer}}/{name}": theirs for name, theirs in of_layer.items()},
    }


_MIXER = "backbone.layers.{layer}.mixer"

NEMOTRON_H = Family(
    model_type="nemotron_h",
    architecture=_architecture,
    names=_names(
        "backbone",
        {f"experts/{name}": f"{_MIXER}.experts.{{expert}}.{name}_proj.weight" for name in ("up", "down")},
    ),
    fused_names=_names(
        "model",
        {f"experts/{name}": Fused(f"model.layers.{{layer}}.mixer.experts.{name}_proj") for name in ("up", "down")},
    ),
    left_out=r"^mtp\.",
)
