"""The sequences of a data parallel group: the state of the requests that have a KV slot, in arrays."""

from collections.abc import Collection
from time import perf_counter
from typing import NamedTuple

import numpy as np

from moempi.arrays import BoolArray, IntArray
from moempi.backend.values import SAMPLING_REQUEST, SampledTokens, SamplingRequests, has_penalties, sampling_request
from moempi.engine.request import Request

BLOCK_TOKENS = 16
"""Sampled tokens of a sequence that are held before its request takes them."""


class Work(NamedTuple):
    """The sequences `numbers` (S,) of a step, ascending, with `lengths` new rows at positions from `starts` on.

    The first `of_prompt` of the rows of a sequence are of its prompt. It `ends` if no known token is left to compute
    after the step.
    """

    numbers: IntArray
    starts: IntArray
    lengths: IntArray
    of_prompt: IntArray
    ends: BoolArray


_NONE: IntArray = np.zeros(0, np.int64)
NO_WORK = Work(_NONE, _NONE, _NONE, _NONE, np.zeros(0, np.bool_))


class Sequences:
    """The requests in the KV slots `slots`; sequence i is in slot slots[i], and entry i of each array is of it.

    A sequence has `known` tokens of which `computed` are in the cache, at most `capacities`; a scored prompt knows no
    more than it computes. `last_tokens` are the last known tokens of sequences that generate, `prompt_tokens` the
    lengths of their prompts.
    """

    def __init__(self, slots: range) -> None:
        self.requests: list[Request | None] = [None] * len(slots)
        self.slots: IntArray = np.arange(slots.start, slots.stop)
        self.prompts, self.known, self.computed, self.capacities = (np.zeros(len(slots), np.int64) for _ in range(4))
        self.last_tokens, self.prompt_tokens, self._limits = (np.zeros(len(slots), np.int64) for _ in range(3))
        self.finished, self._adjusts, self._looks_at_tokens, self._ignores_eos = (
            np.zeros(len(slots), np.bool_) for _ in range(4)
        )
        self._sampling: SamplingRequests = np.zeros(len(slots), SAMPLING_REQUEST)

    def begin(self, number: int, request: Request) -> None:
        """Let a request, of which nothing is computed, be sequence `number`."""
        rules, prompt_tokens = request.sampling, len(request.prompt_tokens)
        request.slot = int(self.slots[number])
        self.requests[number] = request
        self.prompts[number], self.computed[number], self.capacities[number] = request.prompt.index, 0, request.capacity
        self.known[number] = prompt_tokens if request.limit else request.capacity
        self.prompt_tokens[number], self._limits[number] = prompt_tokens, request.limit
        self.finished[number], self._ignores_eos[number] = False, rules.ignore_eos
        self._adjusts[number] = rules.min_tokens > 0 or has_penalties(rules)
        self._looks_at_tokens[number] = bool(self._adjusts[number] or rules.stop or rules.stop_token_ids)
        self._sampling[number] = sampling_request(rules)

    def end(self, number: int) -> Request:
        """Remove and return the request of a sequence."""
        request, self.requests[number] = self.request(number), None
        return request

    def request(self, number: int) -> Request:
        """The request of a sequence, with the number of its computed positions."""
        request = self.requests[number]
        if request is None:
            raise RuntimeError(f"sequence {number} has no request")
        request.computed = int(self.computed[number])
        return request

    def waiting(self, index: IntArray) -> IntArray:
        """The numbers of known tokens of sequences that are still to be computed."""
        waiting: IntArray = self.known[index] - self.computed[index]
        return waiting

    def work(self, index: IntArray, lengths: IntArray) -> Work:
        """The work of a step: the next `lengths` tokens of sequences."""
        starts = self.computed[index]
        of_prompt = np.minimum(lengths, np.maximum(self.prompt_tokens[index] - starts, 0))
        return Work(index, starts, lengths, of_prompt, lengths == self.waiting(index))

    def tokens(self, work: Work) -> IntArray:
        """The tokens of the rows of a step, one sequence after another."""
        tokens = self.last_tokens[work.numbers].repeat(work.lengths)
        first_rows = work.lengths.cumsum() - work.lengths
        for entry in work.of_prompt.nonzero()[0].tolist():
            row, start, count = int(first_rows[entry]), int(work.starts[entry]), int(work.of_prompt[entry])
            request = self.request(int(work.numbers[entry]))
            tokens[row : row + count] = request.prompt_tokens[start : start + count]
        return tokens

    def advance(self, work: Work) -> None:
        """The rows of a step are computed."""
        self.computed[work.numbers] += work.lengths

    def sampling_requests(self, index: IntArray, end_tokens: Collection[int]) -> SamplingRequests:
        """How to sample the next tokens of sequences that have no other tokens to compute."""
        requests, known = self._sampling[index], self.known[index]
        for row in (requests["temperature"] > 0.0).nonzero()[0].tolist():
            requests["uniform"][row] = self.request(int(index[row])).uniform(int(known[row]))
        for row in self._adjusts[index].nonzero()[0].tolist():
            adjustment = self.request(int(index[row])).logit_adjustment(end_tokens)
            requests["adjustment"][row] = adjustment if adjustment.changes_logits else None
        return requests

    def append(self, index: IntArray, sampled: SampledTokens, *, end_tokens: IntArray) -> BoolArray:
        """Append the token sampled for each sequence; whether it may be the last.

        A sequence whose rules look at its tokens may end with each of them.
        """
        self.known[index] += 1
        self.last_tokens[index] = sampled.tokens
        generated, is_number = self.known[index] - self.prompt_tokens[index], np.isfinite(sampled.logprobs)
        now = perf_counter()
        for number in index[(generated == 1) & is_number].tolist():
            self.request(number).first_token_at = now
        is_end = (sampled.tokens[:, None] == end_tokens).any(axis=1) & ~self._ignores_eos[index]
        may_end: BoolArray = is_end | ~is_number | (generated >= self._limits[index]) | self._looks_at_tokens[index]
        return may_end


class OutputBlocks:
    """The last tokens sampled for `count` sequences, at most BLOCK_TOKENS of each, with `top` likeliest tokens."""

    def __init__(self, count: int, *, top: int) -> None:
        shape = (count, BLOCK_TOKENS)
        self._lengths = np.zeros(count, np.int64)
        self._columns = SampledTokens(
            np.zeros(shape, np.int32),
            np.zeros(shape, np.float32),
            np.zeros((*shape, top), np.int32),
            np.zeros((*shape, top), np.float32),
        )

    def widen(self, top: int) -> None:
        """Make room for `top` likeliest tokens, if there is less; the tokens in the blocks have as many as before."""
        missing = top - self._columns.top_tokens.shape[2]
        if missing > 0:
            tokens, logprobs, *of_top = self._columns.columns
            top_tokens, top_logprobs = (np.pad(column, ((0, 0), (0, 0), (0, missing))) for column in of_top)
            self._columns = SampledTokens(tokens, logprobs, top_tokens, top_logprobs)

    def append(self, index: IntArray, sampled: SampledTokens) -> BoolArray:
        """Append a token to the block of each sequence; whether the block is full."""
        places = index, self._lengths[index]
        for column, values in zip(self._columns.columns, sampled.columns, strict=True):
            column[places] = values
        self._lengths[index] += 1
        full: BoolArray = self._lengths[index] == BLOCK_TOKENS
        return full

    def take(self, number: int, *, top: int) -> SampledTokens:
        """Take the tokens of the block of a sequence, with the `top` likeliest ones of each."""
        length, self._lengths[number] = int(self._lengths[number]), 0
        tokens, logprobs, top_tokens, top_logprobs = (column[number, :length] for column in self._columns.columns)
        return SampledTokens(tokens.copy(), logprobs.copy(), top_tokens[:, :top].copy(), top_logprobs[:, :top].copy())
