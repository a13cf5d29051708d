"""The two tasks, generate and score: the rows of a step that need logits, and what is done with the logits."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, SampledTokens
from moempi.comm.batch import LogitRequests
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import Waits
from moempi.engine.sequences import OutputBlocks, Sequences, Work
from moempi.engine.tokenizer import TextTokenizer
from moempi.model.head import LMHead


class Likeliest(NamedTuple):
    """The likeliest tokens (T, k) int32, and their log-probabilities, at positions (T,) of requests (T,) of the job."""

    requests: IntArray
    positions: IntArray
    tokens: IntArray
    logprobs: npt.NDArray[np.floating[Any]]


class Task(Protocol):
    """What a run does with its prompts. `sample` is called on the last stage, the other methods on the first."""

    def logit_requests(self, sequences: Sequences, work: Work) -> tuple[IntArray, LogitRequests]:
        """The rows of a step that need logits, ascending, and for each a sampling request or a target token."""

    def sample(
        self,
        head: LMHead,
        tensor: TensorGroup,
        rows: Array,
        requests: LogitRequests,
        *,
        counts: Sequence[int],
    ) -> Waits[SampledTokens]:
        """The sampled tokens, or the scores, of rows (N, D) of the last layer.

        Collective over the tensor group, whose rank i brings counts[i] rows; yields while they travel in it.
        """

    def accept(self, sequences: Sequences, work: Work, sampled: SampledTokens) -> Likeliest | None:
        """Advance the requests of a step by the tokens sampled for its logit rows; what is recorded of them at once."""


class Generate:
    """Samples one new token for every request whose tokens are all computed, with the `top` likeliest tokens.

    `top` is the largest `sampling.top_logprobs` of the job's requests.
    """

    def __init__(self, tokenizer: TextTokenizer, *, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._end_tokens = np.array(sorted(tokenizer.eos_tokens), np.int64)
        self._blocks: OutputBlocks | None = None

    def logit_requests(self, sequences: Sequences, work: Work) -> tuple[IntArray, LogitRequests]:
        """The last row of each request that has no uncomputed tokens after this step."""
        rows = np.cumsum(work.lengths)[work.ends] - 1
        return rows, sequences.sampling_requests(work.numbers[work.ends], self._tokenizer.eos_tokens)

    def sample(
        self,
        head: LMHead,
        tensor: TensorGroup,
        rows: Array,
        requests: LogitRequests,
        *,
        counts: Sequence[int],
    ) -> Waits[SampledTokens]:
        return head.sample(rows, requests, tensor=tensor, counts=counts, top=self._top)

    def accept(self, sequences: Sequences, work: Work, sampled: SampledTokens) -> Likeliest | None:
        sequences.advance(work)
        index, blocks = work.numbers[work.ends], self._blocks_of(sequences, sampled)
        is_due = sequences.append(index, sampled, end_tokens=self._end_tokens) | blocks.append(index, sampled)
        for number in index[is_due].tolist():
            request = sequences.request(number)
            request.accept(blocks.take(number, top=request.sampling.top_logprobs), self._tokenizer)
            sequences.finished[number] = request.finish is not None
        return None

    def _blocks_of(self, sequences: Sequences, sampled: SampledTokens) -> OutputBlocks:
        if self._blocks is None:
            self._blocks = OutputBlocks(len(sequences.requests), top=sampled.top_tokens.shape[1])
        return self._blocks


class Score:
    """Scores every prompt token but the first: its log-probability, and the `top` likeliest tokens there.

    The log-probabilities of the likeliest tokens are recorded as `dtype`; a request does not hold them.
    """

    def __init__(self, *, top: int, dtype: Literal["float16", "float32"] = "float32") -> None:
        self._top = top
        self._dtype = np.dtype(dtype)

    def logit_requests(self, sequences: Sequences, work: Work) -> tuple[IntArray, LogitRequests]:
        """The rows whose next token is in the prompt: all but the row of a prompt of one token."""
        targets = [
            sequences.request(number).prompt_tokens[start + 1 : start + 1 + length]
            for number, start, length in zip(*(values.tolist() for values in work[:3]), strict=True)
        ]
        has_targets = np.array([len(tokens) > 0 for tokens in targets], np.bool_)
        rows = np.flatnonzero(np.repeat(has_targets, work.lengths))
        return rows, np.concatenate([np.zeros(0, np.int64), *targets])

    def sample(
        self,
        head: LMHead,
        tensor: TensorGroup,
        rows: Array,
        requests: LogitRequests,
        *,
        counts: Sequence[int],
    ) -> Waits[SampledTokens]:
        return head.score(rows, requests, tensor=tensor, counts=counts, top=self._top)

    def accept(self, sequences: Sequences, work: Work, sampled: SampledTokens) -> Likeliest | None:
        sequences.advance(work)
        first, places = 0, []
        scores = SampledTokens(sampled.tokens, sampled.logprobs, sampled.top_tokens[:, :0], sampled.top_logprobs[:, :0])
        for number, start, length in zip(*(values.tolist() for values in work[:3]), strict=True):
            request = sequences.request(number)
            own = min(length, len(request.prompt_tokens) - 1 - start)
            request.accept_scores(scores.take(slice(first, first + own)))
            sequences.finished[number] = request.finish is not None
            places.append((np.full(max(own, 0), sequences.prompts[number]), start + 1 + np.arange(own)))
            first += own
        if not self._top or not first:
            return None
        requests, positions = map(np.concatenate, zip(*places, strict=True))
        return Likeliest(requests, positions, sampled.top_tokens, sampled.top_logprobs.astype(self._dtype, copy=False))
