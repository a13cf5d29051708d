"""What an LLM returns for each request: a few Python lists, made of the record that a job would write."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from moempi.arrays import BoolArray, Float32Array, Int32Array
from moempi.storage.records import Record, RequestRecord, TraceRecord

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


def scored(record: RequestRecord, *, top_n: int) -> Scored:
    """The result of a request of the task score, for which `top_n` likeliest tokens were requested."""
    likeliest = _likeliest(record.score_top_tokens, record.score_top_logprobs)
    if top_n and not likeliest:
        likeliest = [{} for _ in record.score]  # a prompt of one token has none of them
    return Scored(
        id=record.id,
        tokens=record.prompt.tolist(),
        logprobs=record.score.tolist(),
        top_logprobs=likeliest,
        finish=record.finish,
        error=record.error,
    )


def with_likeliest(records: Iterable[Record]) -> list[RequestRecord]:
    """The records of all requests in order, each with the likeliest tokens that were recorded at its positions."""
    done: dict[int, RequestRecord] = {}
    traces: list[TraceRecord] = []
    for record in records:
        if isinstance(record, RequestRecord):
            done[record.index] = record
        elif isinstance(record, TraceRecord):
            traces.append(record)
    for trace in traces:
        for index in np.unique(trace.requests).tolist():
            if len(done[index].score):
                own = trace.requests == index
                done[index] = _with_rows(done[index], trace.positions[own], trace.columns, own)
    return [done[index] for index in sorted(done)]


def _with_rows(
    record: RequestRecord, positions: Int32Array, columns: Mapping[str, npt.NDArray[Any]], own: BoolArray
) -> RequestRecord:
    """The record with rows of likeliest tokens at positions; without any, they are -1 and NaN."""
    shape = (len(record.score), columns["top_tokens"].shape[1])
    tokens, logprobs = record.score_top_tokens, record.score_top_logprobs
    if tokens.shape != shape:
        tokens, logprobs = np.full(shape, -1, np.int32), np.full(shape, np.nan, np.float32)
    tokens[positions], logprobs[positions] = columns["top_tokens"][own], columns["top_logprobs"][own]
    return msgspec.structs.replace(record, score_top_tokens=tokens, score_top_logprobs=logprobs)


def _likeliest(tokens: Int32Array, logprobs: Float32Array) -> list[dict[int, float]]:
    """The tokens of each row (m, k) with their log-probabilities, the likeliest first; -1 is no token."""
    rows = zip(tokens.tolist(), logprobs.tolist(), strict=True) if tokens.shape[-1] else ()
    return [{token: logprob for token, logprob in zip(*row, strict=True) if token >= 0} for row in rows]
