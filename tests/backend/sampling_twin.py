"""Sampling one row of logits at a time: the slow twin of `sample_tokens`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moempi.backend.sampling import adjusted
from moempi.backend.values import SAMPLING_REQUEST, LogitAdjustment, sampling_request
from moempi.config.job import Sampling


@dataclass(frozen=True)
class Row:
    """How a row is sampled."""

    sampling: Sampling
    uniform: float
    adjustment: LogitAdjustment | None = field(default=None)

    @property
    def takes_likeliest(self):
        return not self.sampling.temperature and self.adjustment is None


def row_of(*, seen: Any = (), generated: Any = (), banned: Any = (), uniform: float = 0.0, **rules: Any) -> Row:
    """A row by these rules, with an adjustment if they need one."""
    arrays = (np.array(tokens, np.int32) for tokens in (seen, generated, banned))
    adjustment = LogitAdjustment(Sampling(**rules), *arrays)
    return Row(adjustment.sampling, uniform, adjustment if adjustment.changes_logits else None)


def requests_of(rows: Sequence[Row]):
    """The rows as the backends take them."""
    entries = [sampling_request(row.sampling, uniform=row.uniform, adjustment=row.adjustment) for row in rows]
    return np.array(entries, SAMPLING_REQUEST)


def sample_slowly(logits, row: Row) -> int:
    """The token of logits (V,), by the definition of each rule."""
    if not np.isfinite(logits.max()):
        return 0
    sampling = row.sampling
    scores = logits.astype(np.float64) if row.adjustment is None else adjusted(logits, row.adjustment)
    likeliest = int(np.argmax(scores))
    if sampling.temperature == 0.0 or scores[likeliest] == -np.inf:
        return likeliest
    with np.errstate(over="ignore"):
        scaled = (scores - scores[likeliest]) / sampling.temperature
    tokens = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        tokens = tokens[: sampling.top_k]
    probabilities = np.exp(scaled[tokens])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        kept = np.cumsum(probabilities) - probabilities < sampling.top_p
        tokens, probabilities = tokens[kept], probabilities[kept]
    if sampling.min_p > 0.0:
        kept = probabilities >= sampling.min_p * probabilities[0]
        tokens, probabilities = tokens[kept], probabilities[kept]
    cumulative = np.cumsum(probabilities)
    drawn = int(np.searchsorted(cumulative, row.uniform * cumulative[-1], side="right"))
    return int(tokens[min(drawn, len(tokens) - 1)])
