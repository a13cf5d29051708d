"""What an LLM returns for each request: a few Python lists, made of the record that a job would write."""

from dataclasses import dataclass
from typing import Literal

from moempi.arrays import Float32Array, Int32Array
from moempi.storage.records import RequestRecord

Finish = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Generated:
    """The continuation of a prompt of the tokens `prompt`: `text`, and its `tokens` with their natural `logprobs`.

    `top_logprobs` has the likeliest tokens at each place with their log-probabilities, if the sampling asks for some.
    With `finish` "error", `error` says why, and what there is may be a part.
    """

    id: str
    prompt: list[int]
    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish: Finish
    error: str = ""


@dataclass(frozen=True, slots=True)
class Scored:
    """The natural `logprobs` of a prompt's `tokens`, NaN at the first.

    `top_logprobs` has the likeliest tokens at each place with their log-probabilities, if some were requested. With
    `finish` "error", `error` says why, and `logprobs` is empty.
    """

    id: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    finish: Finish
    error: str = ""


def generated(record: RequestRecord) -> Generated:
    """The result of a request of the task generate."""
    return Generated(
        id=record.id,
        prompt=record.prompt.tolist(),
        text=record.text,
        tokens=record.tokens.tolist(),
        logprobs=record.logprobs.tolist(),
        top_logprobs=_likeliest(record.top_tokens, record.top_logprobs),
        finish=record.finish,
        error=record.error,
    )


def scored(record: RequestRecord) -> Scored:
    """The result of a request of the task score."""
    return Scored(
        id=record.id,
        tokens=record.prompt.tolist(),
        logprobs=record.score.tolist(),
        top_logprobs=_likeliest(record.score_top_tokens, record.score_top_logprobs),
        finish=record.finish,
        error=record.error,
    )


def _likeliest(tokens: Int32Array, logprobs: Float32Array) -> list[dict[int, float]]:
    """The tokens of each row (m, k) with their log-probabilities, the likeliest first; -1 is no token."""
    rows = zip(tokens.tolist(), logprobs.tolist(), strict=True) if tokens.shape[-1] else ()
    return [{token: logprob for token, logprob in zip(*row, strict=True) if token >= 0} for row in rows]
