"""The router: the launches of kernels/router.cu."""

import numpy as np

from moempi.backend.cuda.device import Argument
from moempi.backend.cuda.launches import Launches
from moempi.backend.values import Array
from moempi.config.architecture import Router

SCORING = {"softmax": 0, "sigmoid": 1, "softmax_chosen": 2}
TOP_OF_GROUP = {"max": 1, "top2": 2}


def choose_experts(
    launches: Launches, logits: Array, router: Router, *, correction: Array | None, selection_bias: Array | None
) -> tuple[Array, Array]:
    """Experts and weights (T, K) of logits (T, E); both terms (E,) are added to the scores that select."""
    rows, num_experts = logits.shape
    experts, weights = launches.empty((rows, router.top_k), np.int32), launches.empty((rows, router.top_k), np.float32)
    if router.scoring == "sparsemixer":
        rule: tuple[Argument, ...] = (rows, router.jitter, *_rounding(router))
        launches.by_router("choose_sparsemixer", num_experts, logits, experts, weights, *rule)
        return experts, weights
    groups = (router.num_groups, router.kept_groups, TOP_OF_GROUP[router.group_score])
    rule = (rows, router.top_k, SCORING[router.scoring], *groups, *_weighing(router), *_rounding(router))
    launches.by_router("choose_experts", num_experts, logits, correction, selection_bias, experts, weights, *rule)
    return experts, weights


def weigh_experts(launches: Launches, logits: Array, experts: Array, router: Router) -> Array:
    """The weights (T, K) of given experts (T, K)."""
    weights = launches.empty(experts.shape, np.float32)
    rule = (*experts.shape, SCORING[router.scoring], *_weighing(router), *_rounding(router))
    launches.by_router("weigh_experts", logits.shape[1], logits, experts, weights, *rule)
    return weights


def _weighing(router: Router) -> tuple[bool, float, float]:
    return router.renormalize, router.least_sum, router.scaling


def _rounding(router: Router) -> tuple[bool, bool]:
    """Whether logits and weights are rounded to the precision of rows, which changes no float32."""
    return not router.float32_logits, not router.float32_weights
