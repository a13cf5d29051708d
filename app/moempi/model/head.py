"""The LM head: final norm and output matrix, and tokens sampled or scored with their logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend, SampledTokens, SamplingRequests
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import Waits
from moempi.layout.schedule import HEAD_POINTS
from moempi.model.norm import Norm

HEAD_ROWS, LOGITS, _ = HEAD_POINTS
SCORED_ROWS, SCORED_LOGITS = 64, 1 << 24
"""Most rows of a rank, and most logits, that are computed at a time when scoring, which limits memory."""


@dataclass(frozen=True, slots=True)
class LMHead:
    """This rank's part of the head: rows of the matrix (V, D) and of the bias (V,), divided in the tensor group.

    Its methods are collective over the tensor group `tensor`, where rank i has counts[i] rows, and yield while rows and
    logits travel in it. `sample` and `score` block the host for the backend's verbs of these names.
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
        self, x: Array, targets: IntArray, *, tensor: TensorGroup, counts: Sequence[int], top: int
    ) -> Waits[SampledTokens]:
        """Score targets (N,), the tokens after this rank's rows x (N, D), with the `top` likeliest tokens of each."""
        scored, at_once = [], max(1, min(SCORED_ROWS, SCORED_LOGITS // self.vocab_size))
        for first in range(0, max(*counts, 1), at_once):
            chunk = slice(first, first + at_once)
            in_chunk = [min(max(count - first, 0), at_once) for count in counts]
            logits = yield from self._logits(x[chunk], tensor, in_chunk)
            scored.append(self.backend.score(logits, targets[chunk], top=top))
        return SampledTokens.join(scored)

    def _logits(self, x: Array, tensor: TensorGroup, counts: Sequence[int]) -> Waits[Array]:
        """Logits (N, V) of this rank's rows, in float32."""
        rows = yield from tensor.all_gather_rows(self.norm(self.backend, x), counts, HEAD_ROWS)
        logits = self.backend.logits(rows, self.matrix, self.bias)
        return (yield from tensor.exchange_logits(logits, counts, vocab_size=self.vocab_size, point=LOGITS))
