"""The LM head: final norm and output matrix, and tokens sampled or scored with their logits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.backend.scores import SUM_TOKENS, RowScores, Scored
from moempi.backend.values import Array, SampledTokens, SamplingRequests
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import Waits
from moempi.config.traces import most_above
from moempi.layout.row_split import part_range
from moempi.layout.schedule import HEAD_POINTS
from moempi.model.norm import Norm

HEAD_ROWS, LOGITS, _ = HEAD_POINTS
SCORED_ROWS, SCORED_LOGITS, SCORED_TOKENS = 64, 1 << 22, 1 << 20
"""Most rows of a rank, logits, and tokens that are written, which are computed at a time when scoring: its memory."""

OnScored = Callable[[slice, Scored], None]
"""Takes the scores of a range of a rank's rows."""


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """What is written of each scored position: the `top` likeliest tokens, and all above a log-probability."""

    top: int = 0
    threshold: float = 0.0

    def most(self, vocab_size: int) -> int:
        """The largest number of tokens at a position."""
        return min(self.top, vocab_size) + most_above(self.threshold, vocab_size)


NOTHING_ELSE = ScoredTokens()


@dataclass(frozen=True, slots=True)
class LMHead:
    """This rank's part of the head: rows of the matrix (V, D) and of the bias (V,), divided in the tensor group.

    Its methods are collective over the tensor group `tensor`, where rank i has counts[i] rows, and yield while rows and
    logits travel in it. `sample` and `score` block the host for the backend's verbs.
    """

    backend: Backend
    norm: Norm
    matrix: Array
    bias: Array | None
    vocab_size: int

    def sample(
        self, x: Array, requests: SamplingRequests, *, tensor: TensorGroup, counts: Sequence[int], top: int
    ) -> Waits[SampledTokens]:
        """Sample the next token after each of this rank's rows x (N, D), with the `top` likeliest tokens."""
        return self.backend.sample((yield from self._logits(x, tensor, counts)), requests, top=top)

    def score(
        self,
        x: Array,
        targets: IntArray,
        *,
        tensor: TensorGroup,
        counts: Sequence[int],
        recorded: ScoredTokens = NOTHING_ELSE,
        on_scored: OnScored = lambda rows, scored: None,
    ) -> Waits[SampledTokens]:
        """Score targets (N,), the tokens after this rank's rows x (N, D).

        The `recorded` tokens of each position go to `on_scored`, a piece of rows at a time. Memory holds SCORED_LOGITS
        logits and SCORED_TOKENS recorded tokens, or those of one row, whatever the vocabulary and the prompts are.
        """
        logprobs = np.empty(len(targets), np.float32)
        at_once = max(1, min(SCORED_ROWS, SCORED_TOKENS // max(recorded.most(self.vocab_size), 1)))
        for first in range(0, max(*counts, 1), at_once):
            chunk = slice(first, first + at_once)
            in_chunk = [min(max(count - first, 0), at_once) for count in counts]
            scored = yield from self._scores(x[chunk], targets[chunk], tensor, in_chunk, recorded)
            logprobs[chunk] = scored.logprobs
            on_scored(chunk, scored)
        nothing = np.zeros((len(targets), 0), np.int32), np.zeros((len(targets), 0), np.float32)
        return SampledTokens(targets.astype(np.int32), logprobs, *nothing)

    def _scores(
        self, x: Array, targets: IntArray, tensor: TensorGroup, counts: Sequence[int], recorded: ScoredTokens
    ) -> Waits[Scored]:
        """The scores of a few rows, from the logits of a piece of the vocabulary at a time."""
        backend = self.backend
        scores = RowScores(targets, top=recorded.top, threshold=recorded.threshold)
        rows = yield from tensor.all_gather_rows(self.norm(backend, x), counts, HEAD_ROWS)
        for first, pieces in self._pieces(tensor.size, num_rows=len(rows)):
            lengths = list(map(len, pieces))
            local = range(first, first + lengths[tensor.part])
            bias = None if self.bias is None else self.bias[local.start : local.stop]
            logits = backend.logits(rows, backend.take_outputs(self.matrix, local), bias)
            of_parts = yield from tensor.exchange_logit_parts(logits, counts, lengths=lengths, point=LOGITS)
            for piece, part in zip(pieces, of_parts, strict=True):
                scan = backend.scan(part, targets, first=piece.start, top=recorded.top)
                scores.add(scan, first=piece.start, width=len(piece))
                if recorded.threshold:
                    found, tokens, values = backend.tokens_above(part, scores.least_logits())
                    scores.add_above(found, tokens + piece.start, values)
        return scores.result()

    def _pieces(self, num_parts: int, *, num_rows: int) -> Iterator[tuple[int, list[range]]]:
        """Yield the tokens of a piece of each rank's part of the vocabulary, and the number of the first in its part.

        Pieces are whole blocks of SUM_TOKENS, but for the last. None is empty: a layout of more ranks in a tensor group
        than tokens in the vocabulary is refused.
        """
        lengths = [len(part_range(self.vocab_size, num_parts, part)) for part in range(num_parts)]
        width = max(1, SCORED_LOGITS // (max(num_rows, 1) * SUM_TOKENS)) * SUM_TOKENS
        firsts = range(0, max(min(lengths), 1), width)
        for first in firsts:
            widths = [length - first if first == firsts[-1] else width for length in lengths]
            starts = np.cumsum([0, *lengths[:-1]]) + first
            yield first, [range(start, start + own) for start, own in zip(starts.tolist(), widths, strict=True)]

    def _logits(self, x: Array, tensor: TensorGroup, counts: Sequence[int]) -> Waits[Array]:
        """Logits (N, V) of this rank's rows, in float32."""
        rows = yield from tensor.all_gather_rows(self.norm(self.backend, x), counts, HEAD_ROWS)
        logits = self.backend.logits(rows, self.matrix, self.bias)
        return (yield from tensor.exchange_logits(logits, counts, vocab_size=self.vocab_size, point=LOGITS))
