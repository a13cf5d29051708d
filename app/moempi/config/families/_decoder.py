"""Reading of the configuration keys that all families share."""

from typing import Any

from moempi.config.architecture import Architecture, AttentionShape, Experts, Rope
from moempi.config.families._reading import CheckpointConfig, head_dim, num_layers, windowed_layers
from moempi.config.families._rope import read_positions


def decoder(
    config: CheckpointConfig,
    family: str,
    *,
    attention: AttentionShape,
    experts: Experts,
    dense_layers: tuple[int, ...] = (),
    **others: Any,
) -> Architecture:
    """The architecture of a decoder from the usual keys; `others` are further fields of Architecture."""
    config.require("hidden_act", "silu")
    config.ignore(*(() if dense_layers else ("intermediate_size",)))
    is_plain = not attention.windowed_layers and attention.indexer is None and "delta_rule" not in others
    if is_plain and config.has("layer_types") and windowed_layers(config):
        raise config.error("layer_types has windows that are not supported")
    bos = config.tokens("bos_token_id")
    fields = {
        "max_positions": read_positions(config),
        "dense_width": config.integer("intermediate_size") if dense_layers else 0,
        **others,
    }
    return Architecture(
        family=family,
        vocab_size=config.integer("vocab_size"),
        width=config.integer("hidden_size"),
        num_layers=num_layers(config),
        attention=attention,
        experts=experts,
        dense_layers=dense_layers,
        norm_eps=config.number("rms_norm_eps"),
        tied_embeddings=config.flag("tie_word_embeddings"),
        bos_token=bos[0] if bos else None,
        eos_tokens=config.tokens("eos_token_id"),
        **fields,
    )


def heads(config: CheckpointConfig, *, rope: Rope, **others: Any) -> AttentionShape:
    """AttentionShape from the usual keys; `others` are further fields of AttentionShape."""
    return AttentionShape(
        num_heads=config.integer("num_attention_heads"),
        num_kv_heads=config.integer("num_key_value_heads"),
        head_dim=head_dim(config),
        rope=rope,
        **others,
    )


def all_layers_windowed(config: CheckpointConfig) -> dict[str, Any]:
    """The window fields of AttentionShape, for families whose `sliding_window` applies to every layer."""
    if not config.has("sliding_window"):
        return {}
    return {"window": config.integer("sliding_window"), "windowed_layers": tuple(range(num_layers(config)))}
