"""A request: a prompt, its tokens and their state of computation, and the record that is written in the end."""

from collections.abc import Collection
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from moempi.arrays import Int32Array
from moempi.backend.values import NO_TOKENS, LogitAdjustment, SampledTokens
from moempi.config.job import HiddenPositions, Sampling
from moempi.config.traces import first_hidden
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import DataError
from moempi.storage.openai_batch import CHAT
from moempi.storage.prompts import Prompt
from moempi.storage.records import RequestRecord

LogprobColumns = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]

NO_LOGPROBS: LogprobColumns = (np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))


@dataclass(slots=True)
class Request:
    """A prompt of `prompt_tokens` (n,) and the tokens generated after it.

    The first `computed` positions are in the cache of KV slot `slot`. At most `limit` tokens are generated, none for a
    scored prompt. `sampled` holds the sampled tokens or the scores in order; while it has a slot, its last tokens may
    be in `OutputBlocks`. `finish` is None until it is finished.
    `admitted_at` and `first_token_at` are readings of `time.perf_counter`, None until then.
    """

    prompt: Prompt
    prompt_tokens: Int32Array
    limit: int
    slot: int = -1
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    sampled: list[SampledTokens] = field(default_factory=list)
    text: str = ""
    finish: Literal["stop", "length", "error"] | None = None
    error: str = ""
    admitted_at: float | None = None
    first_token_at: float | None = None

    @property
    def sampling(self) -> Sampling:
        """The sampling parameters of its prompt."""
        return self.prompt.sampling

    @property
    def capacity(self) -> int:
        """The largest number of positions in the cache: the last token, generated or scored, predicts nothing."""
        return max(len(self.prompt_tokens) + self.limit - 1, 1)

    @property
    def num_waiting(self) -> int:
        """Number of tokens that are still to be computed."""
        return (len(self.prompt_tokens) + len(self.tokens) if self.limit else self.capacity) - self.computed

    @property
    def all_tokens(self) -> Int32Array:
        """The tokens of the prompt, then the generated tokens (n + m,)."""
        return np.concatenate([self.prompt_tokens, np.array(self.tokens, np.int32)])

    def uniform(self, position: int) -> float:
        """The uniform number by which the token at `position` is sampled, a function of seed, id and position."""
        bits = xxhash.xxh3_64_intdigest(f"{self.sampling.seed}/{self.prompt.id}/{position}".encode())
        return (bits >> 11) * 2.0**-53

    def logit_adjustment(self, end_tokens: Collection[int] = ()) -> LogitAdjustment:
        """What changes the logits of its next token.

        `end_tokens` and stop tokens are not sampled before the output has `min_tokens`.
        """
        rules = self.sampling
        seen = self.all_tokens if rules.repetition_penalty != 1.0 else NO_TOKENS
        counts_generated = rules.presence_penalty or rules.frequency_penalty
        generated = np.array(self.tokens, np.int32) if counts_generated else NO_TOKENS
        ends = {*rules.stop_token_ids, *(() if rules.ignore_eos else end_tokens)}
        banned = np.array(sorted(ends), np.int32) if len(self.tokens) < rules.min_tokens else NO_TOKENS
        return LogitAdjustment(rules, seen, generated, banned)

    def accept(self, sampled: SampledTokens, tokenizer: TextTokenizer) -> None:
        """Append the next tokens; finish if the last is a stop token or ends a stop text, is an end token or the limit.

        The tokens before the last finish nothing. Finish with an error if the model's logits for the last one are not
        numbers, or the tokens cannot be decoded.
        """
        is_number = bool(np.isfinite(sampled.logprobs[-1]))
        sampled = sampled if is_number else sampled.take(slice(-1))
        self.tokens.extend(sampled.tokens.tolist())
        self.sampled.append(sampled)
        try:
            if is_number:
                self._finish(tokenizer)
            else:
                self.fail("the model's logits are not numbers")
        except DataError as error:
            self.fail(str(error))

    def _finish(self, tokenizer: TextTokenizer) -> None:
        """Finish if the last token does."""
        token = self.tokens[-1]
        stops = self.sampling.stop if len(self.tokens) >= self.sampling.min_tokens else ()
        if token in self.sampling.stop_token_ids:
            self.finish, self.text = "stop", tokenizer.decode(self.tokens[:-1])
        elif (before := tokenizer.text_before_stop(self.tokens, stops)) is not None:
            self.finish, self.text = "stop", before
        elif token in tokenizer.eos_tokens and not self.sampling.ignore_eos:
            self.finish, self.text = "stop", tokenizer.decode(self.tokens)
        elif len(self.tokens) >= self.limit:
            self.finish, self.text = "length", tokenizer.decode(self.tokens)

    def accept_scores(self, scored: SampledTokens) -> None:
        """Append the scores of the next prompt tokens; finish after the last."""
        if not np.isfinite(scored.logprobs).all():
            self.fail("the model's logits are not numbers")
            return
        self.sampled.append(scored)
        if not self.num_waiting:
            self.finish = "length"

    def fail(self, error: str) -> None:
        """Finish with an error."""
        self.finish, self.error = "error", error

    def hidden_rows(self, positions: HiddenPositions | None) -> tuple[int, int]:
        """The first of the computed positions whose hidden states are recorded, and their number; None: no position."""
        if positions is None or positions == "all":
            return 0, self.computed if positions else 0
        first = first_hidden(positions, len(self.prompt_tokens), self.capacity)
        if self.computed <= max(first, 0):
            return 0, 0
        return first, 1 if positions == "last" else self.computed - first

    def to_record(self, *, task: str, since: int = 0, hidden: HiddenPositions | None = None) -> RequestRecord:
        """The record of the finished request, of the attempt at the job whose first step is `since`.

        `hidden` are the positions whose hidden states the job records, None if it records none.
        """
        output = score = NO_LOGPROBS
        hidden_first, hidden_rows = self.hidden_rows(hidden)
        if task == "generate":
            output = _logprob_columns(self.sampled, first_token=True)
        elif self.finish != "error":  # an error may follow the scores of some of the prompt's tokens
            score = _logprob_columns(self.sampled, first_token=False)
        return RequestRecord(
            index=self.prompt.index,
            id=self.prompt.id,
            finish=self.finish or "error",
            error=self.error,
            computed=self.computed,
            hidden_first=hidden_first,
            hidden_rows=hidden_rows,
            since=since,
            first_token_s=self._since_admission(self.first_token_at),
            end_to_end_s=self._since_admission(perf_counter()),
            reference=self.prompt.reference,
            prompt_id=self.prompt.prompt_id,
            endpoint=None if self.prompt.chat is None else CHAT,
            metadata=self.prompt.metadata,
            group=self.prompt.group,
            text=self.text,
            prompt=self.prompt_tokens,
            tokens=np.array(self.tokens, np.int32),
            logprobs=output[0],
            top_tokens=output[1],
            top_logprobs=output[2],
            score=score[0],
            score_top_tokens=score[1],
            score_top_logprobs=score[2],
        )

    def _since_admission(self, at: float | None) -> float | None:
        return None if at is None or self.admitted_at is None else at - self.admitted_at


def _logprob_columns(sampled: list[SampledTokens], *, first_token: bool) -> LogprobColumns:
    """Log-probabilities, likeliest tokens and the log-probabilities of these, of all tokens in order.

    Without `first_token`, an empty entry (NaN, token -1) for the first token is put before them.
    """
    if not sampled:
        return NO_LOGPROBS
    if not first_token:
        shape = (1, sampled[0].top_tokens.shape[1])
        nan, no_token = np.full(shape, np.nan, np.float32), np.full(shape, -1, np.int32)
        sampled = [SampledTokens(no_token[0, :0], np.full(1, np.nan, np.float32), no_token, nan), *sampled]
    joined = SampledTokens.join(sampled)
    return joined.logprobs, joined.top_tokens, joined.top_logprobs
