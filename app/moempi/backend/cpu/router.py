"""The router's rules (`config.architecture.Router`) on float32 logits, in NumPy."""

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, IntArray
from moempi.config.architecture import Router

TOP_OF_GROUP = {"max": 1, "top2": 2}


def choose(logits: Float32Array, router: Router, correction: Float32Array | None) -> tuple[IntArray, Float32Array]:
    """Choose experts and weights (T, K) from logits (T, E), in order of falling score, lowest index on a tie."""
    if router.scoring == "sparsemixer":
        return _sparsemixer(logits, router.jitter)
    scores = _scores(logits, router)
    ranked = scores if correction is None else scores + correction
    if router.num_groups > 1:
        ranked = _in_best_groups(ranked, router)
    experts = np.argsort(-ranked, axis=1, kind="stable")[:, : router.top_k]
    return experts.astype(np.int32), _weights(scores, experts, router)


def weights_of(logits: Float32Array, experts: IntArray, router: Router) -> Float32Array:
    """Weights (T, K) of given experts (T, K); not defined for SparseMixer, whose weights depend on its own choice."""
    return _weights(_scores(logits, router), experts, router)


def _weights(scores: Float32Array, experts: IntArray, router: Router) -> Float32Array:
    weights: Float32Array = np.take_along_axis(scores, experts.astype(np.intp), axis=1)
    if router.scoring == "softmax_chosen":
        weights = _softmax(weights)
    if router.renormalize:
        weights /= np.maximum(weights.sum(axis=1, keepdims=True), np.float32(router.least_sum))
    weights *= np.float32(router.scaling)
    return weights


def _scores(logits: Float32Array, router: Router) -> Float32Array:
    if router.scoring == "softmax":
        return _softmax(logits)
    if router.scoring == "sigmoid":
        with np.errstate(over="ignore"):
            return (1 / (1 + np.exp(-logits))).astype(np.float32)
    return logits


def _softmax(logits: Float32Array) -> Float32Array:
    scores: Float32Array = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    return scores


def _in_best_groups(ranked: Float32Array, router: Router) -> Float32Array:
    """Set scores outside the `kept_groups` best groups of adjacent experts to -inf (DeepSeek-V2 and -V3, 2024)."""
    rows, experts = ranked.shape
    groups = ranked.reshape(rows, router.num_groups, experts // router.num_groups)
    best = np.sort(groups, axis=2)[:, :, -TOP_OF_GROUP[router.group_score] :].sum(axis=2)
    kept = np.argsort(-best, axis=1, kind="stable")[:, : router.kept_groups]
    outside = np.ones(best.shape, bool)
    np.put_along_axis(outside, kept, False, axis=1)
    limited: Float32Array = np.where(outside[:, :, None], np.float32(-np.inf), groups).reshape(ranked.shape)
    return limited


def _sparsemixer(logits: Float32Array, jitter: float) -> tuple[IntArray, Float32Array]:
    """The two most likely experts, each weighed among the experts with logits near its own (Liu et al. 2023)."""
    first, first_weights = _weigh_most_likely(logits, logits, jitter)
    others = logits.copy()
    np.put_along_axis(others, first, -np.inf, axis=1)
    second, second_weights = _weigh_most_likely(others, logits, jitter)
    experts = np.concatenate([first, second], axis=1).astype(np.int32)
    return experts, np.concatenate([first_weights, second_weights], axis=1)


def _weigh_most_likely(
    candidates: Float32Array, logits: Float32Array, jitter: float
) -> tuple[npt.NDArray[np.intp], Float32Array]:
    best = candidates.argmax(axis=1, keepdims=True)
    highest = np.take_along_axis(candidates, best, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        far = (highest - logits) / np.maximum(np.abs(logits), highest) > 2 * jitter
    near = np.where(far, np.float32(-np.inf), candidates)
    return best, np.take_along_axis(_softmax(near), best, axis=1)
