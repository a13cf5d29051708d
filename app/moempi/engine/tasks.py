"""The two tasks: what a step asks of the rows that it wants, and what becomes of the answers."""

from collections.abc import Sequence as ManyOf
from typing import Protocol, cast

import numpy as np

from moempi.backend.protocol import Array, SampledTokens, SamplingRequest
from moempi.comm.batch import LogitRequest
from moempi.comm.tensor_group import TensorGroup
from moempi.engine.scheduler import Work
from moempi.engine.tokenizer import TextTokenizer
from moempi.model.transformer import Transformer

HEAD_ROWS = 64


class Task(Protocol):
    """`pick` happens on the last stage, the rest on the first."""

    def logit_requests(self, work: ManyOf[Work]) -> tuple[list[int], list[LogitRequest]]:
        """The rows of the step whose logits are wanted, ascending, and what is asked of each."""

    def sample(
        self,
        model: Transformer,
        tensor: TensorGroup,
        rows: Array,
        requests: ManyOf[LogitRequest],
        *,
        counts: ManyOf[int],
    ) -> SampledTokens:
        """Answer for rows (N, D) of the last layer. Collective over the group, whose ranks bring `counts`; blocks."""

    def accept(self, work: ManyOf[Work], sampled: SampledTokens) -> None:
        """Move the sequences of a step on, given the answers to all that it wanted."""


class Generate:
    """One new token for every sequence whose tokens are all computed; `top` is the most that any request asks for."""

    def __init__(self, tokenizer: TextTokenizer, *, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top

    def logit_requests(self, work: ManyOf[Work]) -> tuple[list[int], list[LogitRequest]]:
        """See `Task.wants`: the last row of each sequence that has no token left."""
        rows: list[int] = []
        asked: list[LogitRequest] = []
        end = 0
        for sequence, count in work:
            end += count
            if count == sequence.num_waiting:
                rows.append(end - 1)
                asked.append(sequence.sampling_request())
        return rows, asked

    def sample(
        self,
        model: Transformer,
        tensor: TensorGroup,
        rows: Array,
        requests: ManyOf[LogitRequest],
        *,
        counts: ManyOf[int],
    ) -> SampledTokens:
        """See `Task.pick`: the next tokens."""
        logits = model.logits(rows, tensor, counts)
        return model.backend.sample(logits, cast("ManyOf[SamplingRequest]", requests), top=self._top)

    def accept(self, work: ManyOf[Work], sampled: SampledTokens) -> None:
        row = 0
        for sequence, count in work:
            sequence.computed += count
            if not sequence.num_waiting:
                own = sampled.take(slice(row, row + 1)).with_top(sequence.sampling.top_logprobs)
                sequence.accept(own, self._tokenizer)
                row += 1


class Score:
    """The log-probability of every prompt token but the first, and the `top` likeliest tokens at each."""

    def __init__(self, *, top: int) -> None:
        self._top = top

    def logit_requests(self, work: ManyOf[Work]) -> tuple[list[int], list[LogitRequest]]:
        """See `Task.wants`: every row that has a next token in its prompt."""
        rows: list[int] = []
        asked: list[LogitRequest] = []
        first = 0
        for sequence, count in work:
            targets = sequence.prompt_tokens[sequence.computed + 1 : sequence.computed + 1 + count]
            rows.extend(range(first, first + len(targets)))
            asked.extend(targets)
            first += count
        return rows, asked

    def sample(
        self,
        model: Transformer,
        tensor: TensorGroup,
        rows: Array,
        requests: ManyOf[LogitRequest],
        *,
        counts: ManyOf[int],
    ) -> SampledTokens:
        """See `Task.pick`: in pieces of HEAD_ROWS rows a rank, for a row of logits is as long as the vocabulary."""
        targets = np.array(cast("ManyOf[int]", requests), np.int64)
        picked = []
        for first in range(0, max(*counts, 1), HEAD_ROWS):
            piece = slice(first, first + HEAD_ROWS)
            logits = model.logits(rows[piece], tensor, [min(max(count - first, 0), HEAD_ROWS) for count in counts])
            picked.append(model.backend.score(logits, targets[piece], top=self._top))
        return SampledTokens.join(picked)

    def accept(self, work: ManyOf[Work], sampled: SampledTokens) -> None:
        first = 0
        for sequence, count in work:
            sequence.computed += count
            own = count if sequence.num_waiting else count - 1
            sequence.accept_scores(sampled.take(slice(first, first + own)))
            first += own
