"""Log-probabilities from the logits of a vocabulary in pieces, whose sizes change no bit.

The exponentials of each block of SUM_TOKENS tokens are summed first, then the sums of blocks in order of their tokens.
"""

from typing import NamedTuple

import numpy as np

from moempi.arrays import Float32Array, Int32Array, IntArray
from moempi.backend.values import LogitScan

SUM_TOKENS = 4096
"""Tokens of a block; each piece but the last is of whole blocks."""
SLACK = 1e-3
"""More than the rounding of a log-probability, in which a bound on logits may err."""

_QUIET = np.errstate(over="ignore", invalid="ignore", divide="ignore")
"""A logit that is not finite makes the log-probabilities of its row NaN."""


class Above(NamedTuple):
    """The tokens above a threshold of each row, ascending: `counts` (N,), then tokens and log-probabilities (S,)."""

    counts: Int32Array
    tokens: Int32Array
    logprobs: Float32Array


class Scored(NamedTuple):
    """Per row: the target's log-probability (N,), the likeliest tokens with theirs (N, k), the tokens above."""

    logprobs: Float32Array
    top_tokens: Int32Array
    top_logprobs: Float32Array
    above: Above


class RowScores:
    """The scores of rows with `targets` (N,), to which the pieces of a vocabulary are added in any order.

    They have the `top` likeliest tokens, and all above the log-probability `threshold`; none if that is 0. Memory holds
    those, and a piece's.
    """

    def __init__(self, targets: IntArray, *, top: int, threshold: float = 0.0) -> None:
        self._targets = targets
        self._top = top
        self._threshold = threshold
        self._target_logits = np.full(len(targets), np.nan, np.float32)
        self._blocks: list[tuple[int, Float32Array, Float32Array]] = []
        self._top_tokens = np.zeros((len(targets), 0), np.int32)
        self._top_logits = np.zeros((len(targets), 0), np.float32)
        nothing: IntArray = np.zeros(0, np.int64)
        self._above: tuple[IntArray, IntArray, Float32Array] = nothing, nothing, np.zeros(0, np.float32)

    def add(self, scan: LogitScan, *, first: int, width: int) -> None:
        """Add a piece: the tokens from `first` on."""
        own = (self._targets >= first) & (self._targets < first + width)
        self._target_logits[own] = scan.target_logits[own]
        self._blocks.append((first, scan.highest, scan.sums))
        if not self._top_tokens.shape[1]:
            self._top_tokens, self._top_logits = scan.top_tokens + np.int32(first), scan.top_logits
            return
        tokens = np.concatenate([self._top_tokens, scan.top_tokens + np.int32(first)], axis=1)
        logits = np.concatenate([self._top_logits, scan.top_logits], axis=1)
        order = np.lexsort((tokens, -without_nan(logits)), axis=1)[:, : self._top]
        self._top_tokens = np.take_along_axis(tokens, order, axis=1)
        self._top_logits = np.take_along_axis(logits, order, axis=1)

    @_QUIET
    def least_logits(self) -> Float32Array:
        """Logits (N,) below which no token is above the threshold, by the pieces so far."""
        highest, shift = self._log_sums()
        slack = SLACK * (1 + np.abs(highest) / 1000)
        least: Float32Array = (highest.astype(np.float64) + shift + self._threshold - slack).astype(np.float32)
        return least

    def add_above(self, rows: IntArray, tokens: IntArray, logits: Float32Array) -> None:
        """Add the tokens of a piece that are above `least_logits`, with their rows."""
        rows, tokens = (np.concatenate(pair) for pair in zip(self._above[:2], (rows, tokens), strict=True))
        logits = np.concatenate([self._above[2], logits])
        may_be_above = logits > self.least_logits()[rows]
        self._above = rows[may_be_above], tokens[may_be_above], logits[may_be_above]

    @_QUIET
    def result(self) -> Scored:
        """The scores, once all pieces are added."""
        highest, shift = self._log_sums()
        logprobs, top_logprobs = _logprobs(highest, shift, self._target_logits, self._top_logits)
        return Scored(logprobs, self._top_tokens, top_logprobs, self._tokens_above(highest, shift))

    def _tokens_above(self, highest: Float32Array, shift: Float32Array) -> Above:
        rows, tokens, logits = self._above
        logprobs = (logits - highest[rows]) - shift[rows]
        order = np.lexsort((tokens, rows))
        order = order[logprobs[order] > self._threshold]
        counts = np.bincount(rows[order], minlength=len(highest)).astype(np.int32)
        return Above(counts, tokens[order].astype(np.int32), logprobs[order])

    def _log_sums(self) -> tuple[Float32Array, Float32Array]:
        """The largest logit m of each row, and the logarithm of its sum of exp(x - m)."""
        blocks = sorted(self._blocks, key=lambda block: block[0])
        of_blocks, sums = (np.concatenate([block[part] for block in blocks], axis=1) for part in (1, 2))
        return _log_sums(of_blocks, sums)


@_QUIET
def logprobs_of(scan: LogitScan) -> tuple[Float32Array, Float32Array]:
    """The log-probabilities of the targets (N,) and of the likeliest tokens (N, k), from a scan of all tokens."""
    return _logprobs(*_log_sums(scan.highest, scan.sums), scan.target_logits, scan.top_logits)


def _log_sums(highest: Float32Array, sums: Float32Array) -> tuple[Float32Array, Float32Array]:
    """The largest logit m of a row (N,), and log(sum(exp(x - m))) (N,), from the largest and the sum of each block."""
    most: Float32Array = highest.max(axis=1)
    total = (sums * np.exp(highest - most[:, None]).astype(np.float64)).sum(axis=1)
    return most, np.log(total).astype(np.float32)


def _logprobs(
    highest: Float32Array, shift: Float32Array, target_logits: Float32Array, top_logits: Float32Array
) -> tuple[Float32Array, Float32Array]:
    return (target_logits - highest) - shift, (top_logits - highest[:, None]) - shift[:, None]


def without_nan(logits: Float32Array) -> Float32Array:
    """Logits with -inf in the place of NaN, by which the likeliest tokens are chosen."""
    numbers: Float32Array = np.nan_to_num(logits, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    return numbers
