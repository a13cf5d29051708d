"""Sampling a token from one row of logits, on the host.

The rules apply in the order that transformers applies them: repetition penalty, temperature, top-k, top-p, min-p.
"""

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array
from moempi.backend.protocol import SamplingRequest

_LEAST_PENALTY, _LARGEST_PENALTY = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


def sample_token(logits: Float32Array, request: SamplingRequest) -> int:
    """Sample the next token from logits (V,): the most likely if temperature is 0, else by `request.uniform`.

    Logits whose maximum is not a finite number give token 0, whose log-probability then is not finite either.
    """
    sampling = request.sampling
    scores = logits
    if not np.isfinite(logits.max()):
        return 0
    if sampling.repetition_penalty != 1.0:
        scores = penalized(scores, request.seen, penalty=sampling.repetition_penalty)
    likeliest = int(np.argmax(scores))
    if sampling.temperature == 0.0:
        return likeliest
    with np.errstate(over="ignore"):
        scaled = scores.astype(np.float64) / sampling.temperature
    if not np.isfinite(scaled[likeliest]):  # the temperature is so low that no other token has a chance
        return likeliest
    tokens, probabilities = _candidates(scaled, request)
    cumulative = np.cumsum(probabilities)
    drawn = int(np.searchsorted(cumulative, request.uniform * cumulative[-1], side="right"))
    return int(tokens[min(drawn, len(tokens) - 1)])


def penalized(logits: Float32Array, seen: npt.NDArray[np.integer], *, penalty: float) -> Float32Array:
    """Penalize `seen` tokens: divide a positive logit by `penalty`, multiply a negative one (Keskar et al. 2019).

    A penalty beyond the range of float32 counts as the nearest number in it: 0 times infinity is not a number.
    """
    scores = logits.copy()
    tokens = np.unique(seen)
    penalty = min(max(penalty, _LEAST_PENALTY), _LARGEST_PENALTY)
    with np.errstate(over="ignore"):
        scores[tokens] = np.where(scores[tokens] > 0, scores[tokens] / penalty, scores[tokens] * penalty)
    return scores


def _candidates(
    scores: npt.NDArray[np.float64], request: SamplingRequest
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64]]:
    """The tokens kept by top-k, top-p and min-p, most likely first, and their probabilities (not normalized)."""
    sampling = request.sampling
    tokens = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        tokens = tokens[: sampling.top_k]
    probabilities = np.exp(scores[tokens] - scores[tokens[0]])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        before = np.cumsum(probabilities) - probabilities
        kept = before < sampling.top_p
        tokens, probabilities = tokens[kept], probabilities[kept]
    if sampling.min_p > 0.0:
        kept = probabilities >= sampling.min_p * probabilities[0]
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities
