"""Shared by families with the sparse attention of DeepSeek-V3.2: the indexer, and the names of its tensors."""

from moempi.config.architecture import Indexer
from moempi.config.families._deepseek import DEEPSEEK_NAMES
from moempi.config.families._family import in_layers
from moempi.config.families._reading import CheckpointConfig, num_layers

INDEXED_NAMES = DEEPSEEK_NAMES | in_layers(
    {
        "attention/index_q": "self_attn.indexer.wq_b.weight",
        "attention/index_k": "self_attn.indexer.wk.weight",
        "attention/index_k_norm": "self_attn.indexer.k_norm.weight",
        "attention/index_k_norm_bias": "self_attn.indexer.k_norm.bias",
        "attention/index_weights": "self_attn.indexer.weights_proj.weight",
    }
)
_SPARSE = ("indexed_attention", "deepseek_sparse_attention")


def read_indexer(config: CheckpointConfig, *, interleaved: bool, shared_layers: tuple[int, ...] = ()) -> Indexer:
    """The indexer; it rotates as `interleaved` says where the configuration does not."""
    config.refuse("mlp_bias")
    config.require("moe_router_dtype", "float32", "fp32", None)
    if config.has("layer_types"):
        types = config.texts("layer_types")
        if len(types) != num_layers(config) or not set(types) <= set(_SPARSE):
            raise config.error(f"layer_types = {list(types)} is not {_SPARSE[0]} for each layer")
    return Indexer(
        num_heads=config.integer("index_n_heads"),
        head_dim=config.integer("index_head_dim"),
        top_k=config.integer("index_topk"),
        interleaved=config.option("indexer_rope_interleave", absent=interleaved),
        shared_layers=shared_layers,
    )
