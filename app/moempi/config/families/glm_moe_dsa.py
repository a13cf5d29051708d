"""GLM-5, GLM-5.1 and GLM-5.2: DeepSeek-V3.2, with layers that take the positions of an earlier layer's indexer."""

from moempi.config.architecture import Architecture
from moempi.config.families._deepseek import corrected_router, deepseek
from moempi.config.families._family import Family
from moempi.config.families._indexer import INDEXED_NAMES, read_indexer
from moempi.config.families._reading import CheckpointConfig, num_layers

_FIRST_SKIPPED = 2  # layers before which none is shared, where `index_skip_topk_offset` is absent


def _architecture(config: CheckpointConfig) -> Architecture:
    config.ignore("index_share_for_mtp_iteration")
    indexer = read_indexer(config, interleaved=True, shared_layers=_shared_layers(config))
    return deepseek(config, "glm_moe_dsa", router=corrected_router(config), indexer=indexer)


def _shared_layers(config: CheckpointConfig) -> tuple[int, ...]:
    """The layers without an indexer, by `indexer_types`, by `index_topk_pattern`, or by one in `index_topk_freq`."""
    listed, scheduled = _listed(config), _scheduled(config)
    if listed is not None and scheduled is not None and listed != scheduled:
        raise config.error("indexer_types and index_topk_pattern, index_topk_freq or index_skip_topk_offset differ")
    return listed or scheduled or ()


def _listed(config: CheckpointConfig) -> tuple[int, ...] | None:
    if not config.has("indexer_types"):
        return None
    types = config.texts("indexer_types")
    if len(types) != num_layers(config) or not set(types) <= {"full", "shared"}:
        raise config.error(f"indexer_types = {list(types)} is not full or shared for each layer")
    return tuple(layer for layer, kind in enumerate(types) if kind == "shared")


def _scheduled(config: CheckpointConfig) -> tuple[int, ...] | None:
    layers = range(num_layers(config))
    if config.has("index_topk_pattern"):
        pattern = config.text("index_topk_pattern")
        if len(pattern) != len(layers) or not set(pattern) <= {"F", "S"}:
            raise config.error(f"index_topk_pattern = {pattern!r} is not F or S for each layer")
        config.ignore("index_topk_freq", "index_skip_topk_offset")
        return tuple(layer for layer in layers if pattern[layer] == "S")
    if not config.has("index_topk_freq"):
        config.ignore("index_skip_topk_offset")
        return None
    period = config.integer("index_topk_freq")
    skipped = config.integer("index_skip_topk_offset") if config.has("index_skip_topk_offset") else _FIRST_SKIPPED
    if period < 1:
        raise config.error(f"index_topk_freq is {period}, not a positive number")
    return tuple(layer for layer in layers if max(layer - skipped + 1, 0) % period)


GLM_MOE_DSA = Family(model_type="glm_moe_dsa", architecture=_architecture, names=INDEXED_NAMES, more_layers=True)
