"""Sampling a token from each row of logits, on the host.

The rules apply in the order that vLLM and transformers apply them: logit bias, repetition penalty, frequency and
presence penalty, then temperature, top-k, top-p, min-p. They apply in float64, where no rule within its limits
overflows. Rows are sampled together; the token of a row depends on no other row.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.arrays import Float32Array, IntArray
from moempi.backend.values import LogitAdjustment, SamplingRequests, take_likeliest

Scores = npt.NDArray[np.float64]

MOST_SCORES = 1 << 20
"""Scores of rows that are sampled together, which limits memory."""


def sample_tokens(logits: Float32Array, requests: SamplingRequests) -> IntArray:
    """Sample the next token of each row of logits (N, V): the most likely if temperature is 0, else by `uniform`.

    Logits whose maximum is not a finite number give token 0, whose log-probability then is not finite either.
    """
    tokens: IntArray = np.argmax(logits, axis=1)
    is_finite = np.isfinite(_of_columns(logits, tokens))
    tokens[~is_finite] = 0
    others = (is_finite & ~take_likeliest(requests)).nonzero()[0]
    if not len(others):
        return tokens
    at_once = max(1, MOST_SCORES // max(logits.shape[1], 1))
    for top_k in set(requests["top_k"][others].tolist()):
        alike = others[requests["top_k"][others] == top_k]
        for first in range(0, len(alike), at_once):
            rows = alike[first : first + at_once]
            tokens[rows] = _sample_scores(_adjusted_rows(logits[rows], requests[rows]), requests[rows], top_k)
    return tokens


def adjusted(logits: Float32Array, adjustment: LogitAdjustment) -> Scores:
    """The logits (V,) after logit bias and penalties; minus infinity for banned tokens.

    The repetition penalty divides a positive logit of a seen token and multiplies a negative one (Keskar et al. 2019).
    The presence penalty is subtracted once from a generated token, the frequency penalty once for each occurrence.
    """
    sampling, scores = adjustment.sampling, logits.astype(np.float64)
    if sampling.logit_bias:
        scores[list(sampling.logit_bias)] += list(sampling.logit_bias.values())
    seen, penalty = np.unique(adjustment.seen), sampling.repetition_penalty
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    generated, occurrences = np.unique(adjustment.generated, return_counts=True)
    scores[generated] -= sampling.presence_penalty + sampling.frequency_penalty * occurrences
    scores[adjustment.banned] = -np.inf
    return scores


def _adjusted_rows(logits: Float32Array, requests: SamplingRequests) -> Scores:
    scores = logits.astype(np.float64)
    for row, adjustment in enumerate(requests["adjustment"].tolist()):
        if adjustment is not None:
            scores[row] = adjusted(logits[row], adjustment)
    return scores


def _sample_scores(scores: Scores, requests: SamplingRequests, top_k: int) -> IntArray:
    """The tokens (N,) of scores (N, V) by requests with the same top-k."""
    tokens: IntArray = np.argmax(scores, axis=1)
    highest = _of_columns(scores, tokens)
    rows = np.flatnonzero((requests["temperature"] > 0.0) & (highest > -np.inf))
    with np.errstate(over="ignore"):  # at a low temperature no other token has a chance
        scaled = (scores[rows] - highest[rows, None]) / requests["temperature"][rows, None]
    candidates, probabilities = _candidates(scaled, requests[rows], top_k)
    cumulative = np.cumsum(probabilities, axis=1)
    drawn = (cumulative <= requests["uniform"][rows, None] * cumulative[:, -1:]).sum(axis=1)
    last = probabilities.shape[1] - 1 - np.argmax(probabilities[:, ::-1] > 0, axis=1)
    tokens[rows] = _of_columns(candidates, np.minimum(drawn, last))
    return tokens


def _candidates(scores: Scores, requests: SamplingRequests, top_k: int) -> tuple[IntArray, Scores]:
    """The likeliest tokens of each row, first the most likely, and their probabilities (not normalized).

    Tokens that top-p and min-p do not keep have probability 0.
    """
    tokens = likeliest(scores, top_k or scores.shape[1])
    probabilities = np.exp(np.take_along_axis(scores, tokens, axis=1))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    if (requests["top_p"] < 1.0).any():
        before = np.cumsum(probabilities, axis=1) - probabilities
        probabilities[(before >= requests["top_p"][:, None]) & (requests["top_p"] < 1.0)[:, None]] = 0.0
    probabilities[probabilities < requests["min_p"][:, None] * probabilities[:, :1]] = 0.0
    return tokens, probabilities


def likeliest(scores: npt.NDArray[np.floating[Any]], count: int) -> IntArray:
    """The `count` tokens of each row with the highest scores, highest first; of equal ones the lower token first."""
    num_rows, vocabulary = scores.shape
    if not count:
        return np.zeros((num_rows, 0), np.int64)
    if count >= vocabulary:
        return np.argsort(-scores, axis=1, kind="stable")
    least = np.partition(scores, vocabulary - count, axis=1)[:, vocabulary - count]
    rows, tokens = np.nonzero(scores >= least[:, None])
    tokens = tokens[np.lexsort((-scores[rows, tokens], rows))]
    ranks = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return tokens[ranks < count].reshape(num_rows, count)


def _of_columns(values: npt.NDArray[Any], columns: IntArray) -> npt.NDArray[Any]:
    """The value of each row in its column."""
    return values[np.arange(len(values)), columns]
