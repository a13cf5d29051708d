"""The LM head: final norm and output matrix, and the tokens that follow from their logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend, SampledTokens, SamplingRequest
from moempi.comm.tensor_group import TensorGroup
from moempi.model.norm import Norm

SCORED_ROWS = 64
"""Rows of a rank whose logits are computed at a time; a row of logits is as long as the vocabulary."""


@dataclass(frozen=True, slots=True)
class LMHead:
    """The head as a rank of the last stage holds it: this rank's part of the matrix (V, D) and of the bias (V,).

    Its calls are collective over the tensor group `tensor`, whose rank i brings counts[i] rows, and block the host.
    """

    backend: Backend
    norm: Norm
    matrix: Array
    bias: Array | None
    vocab_size: int

    def sample(
        self, x: Array, requests: Sequence[SamplingRequest], *, tensor: TensorGroup, counts: Sequence[int], top: int
    ) -> SampledTokens:
        """The next token after each of this rank's rows x (N, D), with the `top` likeliest tokens."""
        return self.backend.sample(self._logits(x, tensor, counts), requests, top=top)

    def score(
        self, x: Array, targets: IntArray, *, tensor: TensorGroup, counts: Sequence[int], top: int
    ) -> SampledTokens:
        """The log-probability of targets (N,) after this rank's rows x (N, D), with the `top` likeliest tokens."""
        scored = []
        for first in range(0, max(*counts, 1), SCORED_ROWS):
            piece = slice(first, first + SCORED_ROWS)
            logits = self._logits(x[piece], tensor, [min(max(count - first, 0), SCORED_ROWS) for count in counts])
            scored.append(self.backend.score(logits, targets[piece], top=top))
        return SampledTokens.join(scored)

    def _logits(self, x: Array, tensor: TensorGroup, counts: Sequence[int]) -> Array:
        """Logits (N, V) in float32."""
        rows = tensor.all_gather_rows(self.norm(self.backend, x), counts)
        logits = self.backend.logits(rows, self.matrix, self.bias)
        return tensor.exchange_logits(logits, counts, vocab_size=self.vocab_size)
