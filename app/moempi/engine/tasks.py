"""The two tasks, generate and score: the rows of a step that need logits, and what is done with the logits."""

from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np

from moempi.backend.protocol import Array, SampledTokens, SamplingRequest
from moempi.comm.batch import LogitRequest
from moempi.comm.tensor_group import TensorGroup
from moempi.comm.transfers import Waits
from moempi.engine.scheduler import Work
from moempi.engine.tokenizer import TextTokenizer
from moempi.model.head import LMHead


class Task(Protocol):
    """What a run does with its prompts. `sample` is called on the last stage, the other methods on the first."""

    def logit_requests(self, work: Sequence[Work]) -> tuple[list[int], list[LogitRequest]]:
        """The rows of a step that need logits, ascending, and for each a sampling request or a target token."""

    def sample(
        self,
        head: LMHead,
        tensor: TensorGroup,
        rows: Array,
        requests: Sequence[LogitRequest],
        *,
        counts: Sequence[int],
    ) -> Waits[SampledTokens]:
        """The sampled tokens, or the scores, of rows (N, D) of the last layer.

        Collective over the tensor group, whose rank i brings counts[i] rows; yields while they travel in it.
        """

    def accept(self, work: Sequence[Work], sampled: SampledTokens) -> None:
        """Advance the requests of a step by the tokens sampled for its logit rows."""


class Generate:
    """Samples one new token for every request whose tokens are all computed, with the `top` likeliest tokens.

    `top` is the largest `sampling.top_logprobs` of the job's requests.
    """

    def __init__(self, tokenizer: TextTokenizer, *, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top

    def logit_requests(self, work: Sequence[Work]) -> tuple[list[int], list[LogitRequest]]:
        """The last row of each request that has no uncomputed tokens after this step."""
        rows: list[int] = []
        logit_requests: list[LogitRequest] = []
        end = 0
        for request, count in work:
            end += count
            if count == request.num_waiting:
                rows.append(end - 1)
                logit_requests.append(request.sampling_request(self._tokenizer.eos_tokens))
        return rows, logit_requests

    def sample(
        self,
        head: LMHead,
        tensor: TensorGroup,
        rows: Array,
        requests: Sequence[LogitRequest],
        *,
        counts: Sequence[int],
    ) -> Waits[SampledTokens]:
        sampling = cast("Sequence[SamplingRequest]", requests)
        return head.sample(rows, sampling, tensor=tensor, counts=counts, top=self._top)

    def accept(self, work: Sequence[Work], sampled: SampledTokens) -> None:
        row = 0
        for request, count in work:
            request.computed += count
            if not request.num_waiting:
                own = sampled.take(slice(row, row + 1)).with_top(request.sampling.top_logprobs)
                request.accept(own, self._tokenizer)
                row += 1


class Score:
    """Scores every prompt token but the first: its log-probability, and the `top` likeliest tokens there."""

    def __init__(self, *, top: int) -> None:
        self._top = top

    def logit_requests(self, work: Sequence[Work]) -> tuple[list[int], list[LogitRequest]]:
        """The rows whose next token is in the prompt: all but the row of a prompt of one token."""
        rows: list[int] = []
        logit_requests: list[LogitRequest] = []
        first = 0
        for request, count in work:
            targets = request.prompt_tokens[request.computed + 1 : request.computed + 1 + count].tolist()
            rows.extend(range(first, first + len(targets)))
            logit_requests.extend(targets)
            first += count
        return rows, logit_requests

    def sample(
        self,
        head: LMHead,
        tensor: TensorGroup,
        rows: Array,
        requests: Sequence[LogitRequest],
        *,
        counts: Sequence[int],
    ) -> Waits[SampledTokens]:
        targets = np.array(cast("Sequence[int]", requests), np.int64)
        return head.score(rows, targets, tensor=tensor, counts=counts, top=self._top)

    def accept(self, work: Sequence[Work], sampled: SampledTokens) -> None:
        first = 0
        for request, count in work:
            own = min(count, len(request.prompt_tokens) - 1 - request.computed)
            request.computed += count
            request.accept_scores(sampled.take(slice(first, first + own)))
            first += own
