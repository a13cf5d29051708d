"""The LM head: final norm and output matrix, and tokens sampled or scored with their logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend, SampledTokens, SamplingRequest
from moempi.comm.tensor_group import TensorGroup
from moempi.model.norm import Norm

SCORED_ROWS = 64
"""Number of rows of a rank whose logits are computed at a time, which limits the memory for logits."""


@dataclass(frozen=True, slots=True)
class LMHead:
    """This rank's part of the head: rows of the matrix (V, D) and of the bias (V,), divided in the tensor group.

    Its methods are collective over the tensor group `tensor`, where rank i has counts[i] rows, and block the host.
    """

    backend: Backend
    norm: Norm
    matrix: Array
    bias: Array | None
    vocab_size: int

    def sample(
        self, x: Array, requests: Sequence[SamplingRequest], *, tensor: TensorGroup, counts: Sequence[int], top: int
    ) -> SampledTokens:
        """Sample the next token after each of this rank's rows x (N, D), with the `top` likeliest tokens."""
        return self.backend.sample(self._logits(x, tensor, counts), requests, top=top)

    def score(
        self, x: Array, targets: IntArray, *, tensor: TensorGroup, counts: Sequence[int], top: int
    ) -> SampledTokens:
        """Score targets (N,), the tokens after this rank's rows x (N, D), with the `top` likeliest tokens of each."""
        scored = []
        for first in range(0, max(*counts, 1), SCORED_ROWS):
            chunk = slice(first, first + SCORED_ROWS)
            logits = self._logits(x[chunk], tensor, [min(max(count - first, 0), SCORED_ROWS) for count in counts])
            scored.append(self.backend.score(logits, targets[chunk], top=top))
        return SampledTokens.join(scored)

    def _logits(self, x: Array, tensor: TensorGroup, counts: Sequence[int]) -> Array:
        """Logits (N, V) of this rank's rows, in float32."""
        rows = tensor.all_gather_rows(self.norm(self.backend, x), counts)
        logits = self.backend.logits(rows, self.matrix, self.bias)
        return tensor.exchange_logits(logits, counts, vocab_size=self.vocab_size)
