"""DeepSeek-V2 and -V2-Lite: latent attention, softmax router in float32, shared experts."""

from moempi.config.architecture import Architecture, Router
from moempi.config.families._deepseek import DEEPSEEK_NAMES, deepseek
from moempi.config.families._family import Family
from moempi.config.families._reading import CheckpointConfig


def _architecture(config: CheckpointConfig) -> Architecture:
    config.refuse("norm_topk_prob", "mlp_bias")
    config.require("topk_method", "greedy", "group_limited_greedy")
    config.require("scoring_func", "softmax", None)
    config.require("rope_interleave", True, None)
    grouped = config.text("topk_method") == "group_limited_greedy"
    config.ignore("n_group", "topk_group")
    router = Router(
        top_k=config.integer("num_experts_per_tok"),
        num_groups=config.integer("n_group") if grouped else 1,
        kept_groups=config.integer("topk_group") if grouped else 1,
        scaling=config.number("routed_scaling_factor"),
        float32_logits=True,
        float32_weights=True,
    )
    return deepseek(config, "deepseek_v2", router=router)


DEEPSEEK_V2 = Family(model_type="deepseek_v2", architecture=_architecture, names=DEEPSEEK_NAMES)
