"""One request on its way: its tokens, what has been computed of it, and the record it ends as."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from moempi.backend.protocol import SampledTokens, SamplingRequest
from moempi.config.job import Sampling
from moempi.engine.tokenizer import TextTokenizer
from moempi.storage.prompts import Prompt
from moempi.storage.records import RequestRecord

LogprobColumns = tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.float32]]

NO_LOGPROBS: LogprobColumns = (np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))


@dataclass(slots=True)
class Request:
    """A prompt of `prompt_tokens` and the tokens generated after it.

    `computed` positions are in the cache of KV slot `slot`. `limit` is the most tokens to generate; a scored prompt
    generates none.
    """

    prompt: Prompt
    prompt_tokens: list[int]
    limit: int
    slot: int = -1
    computed: int = 0
    tokens: list[int] = field(default_factory=list)
    sampled: list[SampledTokens] = field(default_factory=list)
    text: str = ""
    finish: Literal["stop", "length", "error"] | None = None
    error: str = ""

    @property
    def sampling(self) -> Sampling:
        """How its tokens are chosen."""
        return self.prompt.sampling

    @property
    def capacity(self) -> int:
        """The most positions that it will ever have computed: the last generated token is never fed back."""
        return len(self.prompt_tokens) + max(self.limit - 1, 0)

    @property
    def num_waiting(self) -> int:
        """How many of its tokens are not computed yet."""
        return len(self.prompt_tokens) + len(self.tokens) - self.computed

    def next_tokens(self, count: int) -> list[int]:
        """The next `count` tokens to compute: of the prompt, or the token generated last."""
        length = len(self.prompt_tokens)
        if self.computed < length:
            return self.prompt_tokens[self.computed : self.computed + count]
        return self.tokens[self.computed - length : self.computed - length + count]

    def sampling_request(self) -> SamplingRequest:
        """How its next token is to be chosen. The uniform number depends on seed, id and position alone."""
        position = len(self.prompt_tokens) + len(self.tokens)
        bits = xxhash.xxh3_64_intdigest(f"{self.sampling.seed}/{self.prompt.id}/{position}".encode())
        seen = self.prompt_tokens + self.tokens if self.sampling.repetition_penalty != 1.0 else []
        return SamplingRequest(self.sampling, (bits >> 11) * 2.0**-53, np.array(seen, np.int64))

    def accept(self, sampled: SampledTokens, tokenizer: TextTokenizer) -> None:
        """Take the next token (a Picked of one row), and finish where the rules say so."""
        if not np.isfinite(sampled.logprobs).all():
            self.fail("the model's logits are not numbers")
            return
        token = int(sampled.tokens[0])
        self.tokens.append(token)
        self.sampled.append(sampled)
        if token in tokenizer.eos_tokens and not self.sampling.ignore_eos:
            self.finish = "stop"
        elif self.sampling.stop:
            whole = tokenizer.decode(self.tokens)
            self.text, stopped = _before_stop(whole, self.sampling.stop)
            if stopped:
                self.finish = "stop"
                return
        if self.finish is None and len(self.tokens) >= self.limit:
            self.finish = "length"
        if self.finish is not None:
            self.text = tokenizer.decode(self.tokens)

    def accept_scores(self, scored: SampledTokens) -> None:
        """Take the scores of the next prompt tokens; finished when every token has one."""
        if not np.isfinite(scored.logprobs).all():
            self.fail("the model's logits are not numbers")
            return
        self.sampled.append(scored)
        if self.computed == len(self.prompt_tokens):
            self.finish = "length"

    def fail(self, error: str) -> None:
        """End as an error record."""
        self.finish, self.error = "error", error

    def to_record(self, *, task: str) -> RequestRecord:
        """What is written of it once it is finished."""
        output = score = NO_LOGPROBS
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
            reference=self.prompt.reference,
            text=self.text,
            prompt=np.array(self.prompt_tokens, np.int32),
            tokens=np.array(self.tokens, np.int32),
            logprobs=output[0],
            top_tokens=output[1],
            top_logprobs=output[2],
            score=score[0],
            score_top_tokens=score[1],
            score_top_logprobs=score[2],
        )


def _before_stop(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the earliest stop string, and whether there is one."""
    ends = [end for end in (text.find(stop) for stop in stops) if end >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _logprob_columns(sampled: list[SampledTokens], *, first_token: bool) -> LogprobColumns:
    """Log-probabilities, likeliest tokens and theirs, one after another.

    Unless `first_token` has them, an entry that says nothing (NaN, token -1) stands before.
    """
    if not sampled:
        return NO_LOGPROBS
    logprobs = np.concatenate([part.logprobs for part in sampled])
    top_tokens = np.concatenate([part.top_tokens for part in sampled])
    top_logprobs = np.concatenate([part.top_logprobs for part in sampled])
    unknown = ((0 if first_token else 1, 0),)
    return (
        np.pad(logprobs, unknown, constant_values=np.nan),
        np.pad(top_tokens, (*unknown, (0, 0)), constant_values=-1),
        np.pad(top_logprobs, (*unknown, (0, 0)), constant_values=np.nan),
    )
