"""Sampling a token from one row of logits, on the host.

The rules apply in the order that vLLM and transformers apply them: logit bias, repetition penalty, frequency and
presence penalty, then temperature, top-k, top-p, min-p. They apply in float64, where no rule within its limits
overflows.
"""

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array
from moempi.backend.protocol import SamplingRequest

Scores = npt.NDArray[np.float64]


def sample_token(logits: Float32Array, request: SamplingRequest) -> int:
    """Sample the next token from logits (V,): the most likely if temperature is 0, else by `request.uniform`.

    Logits whose maximum is not a finite number give token 0, whose log-probability then is not finite either.
    """
    if not np.isfinite(logits.max()):
        return 0
    if request.takes_likeliest:
        return int(np.argmax(logits))
    scores = adjusted(logits, request)
    likeliest = int(np.argmax(scores))
    if request.sampling.temperature == 0.0 or scores[likeliest] == -np.inf:
        return likeliest
    with np.errstate(over="ignore"):  # at a low temperature no other token has a chance
        scaled = (scores - scores[likeliest]) / request.sampling.temperature
    tokens, probabilities = _candidates(scaled, request)
    cumulative = np.cumsum(probabilities)
    drawn = int(np.searchsorted(cumulative, request.uniform * cumulative[-1], side="right"))
    return int(tokens[min(drawn, len(tokens) - 1)])


def adjusted(logits: Float32Array, request: SamplingRequest) -> Scores:
    """The logits (V,) after logit bias and penalties; minus infinity for `request.banned` tokens.

    The repetition penalty divides a positive logit of a seen token and multiplies a negative one (Keskar et al. 2019).
    The presence penalty is subtracted once from a generated token, the frequency penalty once for each occurrence.
    """
    sampling, scores = request.sampling, logits.astype(np.float64)
    if sampling.logit_bias:
        scores[list(sampling.logit_bias)] += list(sampling.logit_bias.values())
    seen, penalty = np.unique(request.seen), sampling.repetition_penalty
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    generated, occurrences = np.unique(request.generated, return_counts=True)
    scores[generated] -= sampling.presence_penalty + sampling.frequency_penalty * occurrences
    scores[request.banned] = -np.inf
    return scores


def _candidates(scores: Scores, request: SamplingRequest) -> tuple[npt.NDArray[np.intp], Scores]:
    """The tokens kept by top-k, top-p and min-p, most likely first, and their probabilities (not normalized)."""
    sampling = request.sampling
    tokens = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        tokens = tokens[: sampling.top_k]
    probabilities = np.exp(scores[tokens])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        before = np.cumsum(probabilities) - probabilities
        kept = before < sampling.top_p
        tokens, probabilities = tokens[kept], probabilities[kept]
    if sampling.min_p > 0.0:
        kept = probabilities >= sampling.min_p * probabilities[0]
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities
