"""The two tasks, generate and score: the rows of a step that need logits, and what is done with the logits."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moempi.arrays import IntArray
from moempi.backend.scores import Scored
from moempi.backend.values import Array, SampledTokens
from moempi.comm.batch import LogitRequests
from moempi.comm.head_group import HeadGroup
from moempi.comm.transfers import Waits
from moempi.engine.sequences import OutputBlocks, Sequences, Work
from moempi.engine.tokenizer import TextTokenizer
from moempi.model.head import NOTHING_ELSE, LMHead, ScoredTokens

Tables = Mapping[Literal["score", "above"], Mapping[str, npt.NDArray[Any]]]
"""Columns by name of each table of `results_layout.TRACES`, with the same rows."""
OnRows = Callable[[slice, Tables], None]
"""Takes what is recorded of a range of the logit rows of a step."""


class Task(Protocol):
    """What a run does with its prompts. `sample` is called on the last stage, the methods below it on the first."""

    def expect_top(self, top: int) -> None:
        """From now on requests may ask for `top` likeliest tokens; on all ranks, between two steps."""

    def logit_requests(self, sequences: Sequences, work: Work) -> tuple[IntArray, LogitRequests]:
        """The rows of a step that need logits, ascending, and for each a sampling request or a target token."""

    def sample(
        self,
        head: LMHead,
        group: HeadGroup,
        rows: Array,
        requests: LogitRequests,
        *,
        counts: IntArray,
        record: OnRows,
    ) -> Waits[SampledTokens]:
        """The sampled tokens, or the scores, of rows (N, D) of the last layer.

        Collective over the group that divides the head, where the rank of index t in tensor group g brings counts[g, t]
        rows; yields while they travel in it. What is recorded at each row, and does not travel to the first stage, goes
        to `record`.
        """

    def accept(self, sequences: Sequences, work: Work, sampled: SampledTokens) -> None:
        """Advance the requests of a step by the tokens sampled for its logit rows."""


class Generate:
    """Samples one new token for every request whose tokens are all computed, with the `top` likeliest tokens.

    `top` is the largest `sampling.top_logprobs` of the requests.
    """

    def __init__(self, tokenizer: TextTokenizer, *, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._end_tokens = np.array(sorted(tokenizer.eos_tokens), np.int64)
        self._blocks: OutputBlocks | None = None

    def expect_top(self, top: int) -> None:
        self._top = max(self._top, top)

    def logit_requests(self, sequences: Sequences, work: Work) -> tuple[IntArray, LogitRequests]:
        """The last row of each request that has no uncomputed tokens after this step."""
        rows = work.lengths.cumsum()[work.ends] - 1
        return rows, sequences.sampling_requests(work.numbers[work.ends], self._tokenizer.eos_tokens)

    def sample(
        self,
        head: LMHead,
        group: HeadGroup,
        rows: Array,
        requests: LogitRequests,
        *,
        counts: IntArray,
        record: OnRows,
    ) -> Waits[SampledTokens]:
        return head.sample(rows, requests, group=group, counts=counts, top=self._top)

    def accept(self, sequences: Sequences, work: Work, sampled: SampledTokens) -> None:
        sequences.advance(work)
        index, blocks = work.numbers[work.ends], self._blocks_of(sequences, sampled)
        is_due = sequences.append(index, sampled, end_tokens=self._end_tokens) | blocks.append(index, sampled)
        for number in index[is_due].tolist():
            request = sequences.request(number)
            request.accept(blocks.take(number, top=request.sampling.top_logprobs), self._tokenizer)
            sequences.finished[number] = request.finish is not None

    def _blocks_of(self, sequences: Sequences, sampled: SampledTokens) -> OutputBlocks:
        top = sampled.top_tokens.shape[1]
        if self._blocks is None:
            self._blocks = OutputBlocks(len(sequences.requests), top=top)
        self._blocks.widen(top)
        return self._blocks


class Score:
    """Scores every prompt token but the first, and records the `recorded` tokens there.

    Their log-probabilities are recorded as `dtype`; a request does not hold them.
    """

    def __init__(
        self, recorded: ScoredTokens = NOTHING_ELSE, *, dtype: Literal["float16", "float32"] = "float32"
    ) -> None:
        self._recorded = recorded
        self._dtype = np.dtype(dtype)

    def expect_top(self, top: int) -> None:
        """Do nothing: all requests record the same tokens."""

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
        group: HeadGroup,
        rows: Array,
        requests: LogitRequests,
        *,
        counts: IntArray,
        record: OnRows,
    ) -> Waits[SampledTokens]:
        def on_scored(rows: slice, scored: Scored) -> None:
            record(rows, self._tables(scored))

        return head.score(rows, requests, group=group, counts=counts, recorded=self._recorded, on_scored=on_scored)

    def accept(self, sequences: Sequences, work: Work, sampled: SampledTokens) -> None:
        sequences.advance(work)
        first = 0
        for number, start, length in zip(*(values.tolist() for values in work[:3]), strict=True):
            request = sequences.request(number)
            own = max(min(length, len(request.prompt_tokens) - 1 - start), 0)
            request.accept_scores(sampled.take(slice(first, first + own)))
            sequences.finished[number] = request.finish is not None
            first += own

    def _tables(self, scored: Scored) -> Tables:
        """What is recorded of a few rows."""
        tables: dict[Literal["score", "above"], dict[str, npt.NDArray[Any]]] = {}
        if self._recorded.top:
            logprobs = scored.top_logprobs.astype(self._dtype, copy=False)
            tables["score"] = {"top_tokens": scored.top_tokens, "top_logprobs": logprobs}
        if self._recorded.threshold:
            counts, tokens, logprobs = scored.above
            tables["above"] = {"counts": counts, "tokens": tokens, "logprobs": logprobs.astype(self._dtype, copy=False)}
        return tables
