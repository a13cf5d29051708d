"""The LM head: final norm and output matrix, and tokens sampled or scored with their logits."""

from collections.abc import Callable
from functools import partial

import numpy as np
from msgspec import Struct

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.backend.scores import SUM_TOKENS, RowScores, Scored
from moempi.backend.values import Array, SampledTokens, SamplingRequests
from moempi.comm.head_group import HeadGroup
from moempi.comm.transfers import Waits
from moempi.config.traces import most_above
from moempi.layout.row_buffers import SCORED_LOGITS, scored_rows
from moempi.layout.schedule import HEAD_ROWS, LOGITS
from moempi.model.norm import Norm

SCORED_TOKENS = 1 << 20
"""Most logits, and tokens that are written, which a rank computes at a time when scoring: its memory."""

OnScored = Callable[[slice, Scored], None]
"""Takes the scores of a range of a rank's rows."""


class ScoredTokens(Struct, frozen=True):
    """What is written of each scored position: the `top` likeliest tokens, and all above a log-probability."""

    top: int = 0
    threshold: float = 0.0

    def most(self, vocab_size: int) -> int:
        """The largest number of tokens at a position."""
        return min(self.top, vocab_size) + most_above(self.threshold, vocab_size)


NOTHING_ELSE = ScoredTokens()


class LMHead(Struct, frozen=True):
    """This rank's part of the head: rows of the matrix (V, D) and of the bias (V,), divided in a group.

    Its methods are collective over the `group`, where the rank of index t in tensor group g has counts[g, t] rows, and
    yield while rows and logits travel in it. `sample` and `score` block the host for the backend's verbs. No
    result depends on the division, except where products on a GPU do (`run.reproducible`).
    """

    backend: Backend
    norm: Norm
    matrix: Array
    bias: Array | None
    vocab_size: int

    def sample(
        self, x: Array, requests: SamplingRequests, *, group: HeadGroup, counts: IntArray, top: int
    ) -> Waits[SampledTokens]:
        """Sample the next token after each of this rank's rows x (N, D), with the `top` likeliest tokens."""
        return self.backend.sample((yield from self._logits(x, group, counts)), requests, top=top)

    def score(
        self,
        x: Array,
        targets: IntArray,
        *,
        group: HeadGroup,
        counts: IntArray,
        recorded: ScoredTokens = NOTHING_ELSE,
        on_scored: OnScored = lambda rows, scored: None,
    ) -> Waits[SampledTokens]:
        """Score targets (N,), the tokens after this rank's rows x (N, D).

        The `recorded` tokens of each position go to `on_scored`, a piece of rows at a time. Memory holds SCORED_LOGITS
        logits and SCORED_TOKENS recorded tokens, or those of one row, whatever the vocabulary and the prompts are.
        """
        logprobs = np.empty(len(targets), np.float32)
        most = scored_rows(self.vocab_size, group.size)
        at_once = max(1, min(most, SCORED_TOKENS // max(recorded.most(self.vocab_size), 1)))
        for first in range(0, max(int(counts.max()), 1), at_once):
            chunk = slice(first, first + at_once)
            in_chunk = np.clip(counts - first, 0, at_once)
            scored = yield from self._scores(x[chunk], targets[chunk], group, in_chunk, recorded)
            logprobs[chunk] = scored.logprobs
            on_scored(chunk, scored)
        nothing = np.zeros((len(targets), 0), np.int32), np.zeros((len(targets), 0), np.float32)
        return SampledTokens(targets.astype(np.int32), logprobs, *nothing)

    def _scores(
        self, x: Array, targets: IntArray, group: HeadGroup, counts: IntArray, recorded: ScoredTokens
    ) -> Waits[Scored]:
        """The scores of a few rows: a rank alone has the logits of a piece of the vocabulary at a time."""
        scores = RowScores(targets, top=recorded.top, threshold=recorded.threshold)

        def add(logits: Array, first: int) -> None:
            scan = self.backend.scan(logits, targets, first=first, top=recorded.top)
            scores.add(scan, first=first, width=logits.shape[1])
            if recorded.threshold:
                found, tokens, values = self.backend.tokens_above(logits, scores.least_logits())
                scores.add_above(found, tokens + first, values)

        if group.size > 1:
            add((yield from self._logits(x, group, counts)), 0)
        else:
            self._add_pieces(self.norm(self.backend, x), add)
        return scores.result()

    def _add_pieces(self, rows: Array, add: Callable[[Array, int], None]) -> None:
        """Call `add` with the logits of each piece of the vocabulary and its first token.

        Pieces are whole blocks of SUM_TOKENS, but for the last.
        """
        width = max(1, SCORED_LOGITS // (max(len(rows), 1) * SUM_TOKENS)) * SUM_TOKENS
        for first in range(0, self.vocab_size, width):
            piece = range(first, min(first + width, self.vocab_size))
            bias = None if self.bias is None else self.bias[piece.start : piece.stop]
            add(self.backend.logits(rows, self.backend.take_outputs(self.matrix, piece), bias), first)

    def _logits(self, x: Array, group: HeadGroup, counts: IntArray) -> Waits[Array]:
        """Logits (N, V) of this rank's rows, in float32."""
        rows = yield from group.all_gather_rows(self.norm(self.backend, x), counts, HEAD_ROWS)
        exchange = partial(group.exchange_logits, counts=counts, vocab_size=self.vocab_size, point=LOGITS)
        return (yield from exchange(self.backend.logits(rows, self.matrix, self.bias)))
