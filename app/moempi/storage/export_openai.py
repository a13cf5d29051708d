"""Export of results as the output lines of OpenAI's batch API, whose bodies are completions and chat completions.

https://platform.openai.com/docs/guides/batch. The samples of a prompt are the choices of one line. A token is written
as `token_id:` and its number, because results hold no texts of single tokens.
"""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import groupby
from typing import Any

from moempi.errors import DataError
from moempi.storage.export import metadata_of
from moempi.storage.records import RequestRecord
from moempi.storage.results import ResultFile

MODEL = "moempi"
LEAST_LOGPROB = -9999.0
"""What stands for a log-probability that is not a finite number."""


def openai_lines(results: ResultFile) -> Iterator[dict[str, Any]]:
    """Yield one object per prompt, in input order; raises DataError if the results are scores."""
    if results.scores() is not None:
        raise DataError(
            f"{results.path}: holds scores, which OpenAI's batch API has no form for; export without --format"
        )
    origin = {"created": _seconds(results.attribute("end")), "system_fingerprint": str(results.attribute("weights"))}
    for name, samples in groupby(results.requests(), key=lambda record: record.prompt_id or record.id):
        yield _line(name, list(samples), origin)


def _line(name: str, samples: Sequence[RequestRecord], origin: dict[str, Any]) -> dict[str, Any]:
    first = samples[0]
    failed = [record.error for record in samples if record.finish == "error"]
    whole = [record for record in samples if record.finish != "error"]
    body = _body(first, whole, origin)
    return {
        "id": f"batch_req_{first.index}",
        "custom_id": name,
        "response": {"status_code": 200, "request_id": f"req_{first.index}", "body": body} if whole else None,
        "error": {"code": "request_failed", "message": failed[0]} if failed else None,
    }


def _body(first: RequestRecord, whole: Sequence[RequestRecord], origin: dict[str, Any]) -> dict[str, Any]:
    is_chat = first.endpoint is not None
    choice = _chat_choice if is_chat else _choice
    prompt_tokens, completion_tokens = len(first.prompt), sum(len(record.tokens) for record in whole)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{first.index}",
        "object": "chat.completion" if is_chat else "text_completion",
        "model": MODEL,
        **origin,
        "choices": [choice(number, record) for number, record in enumerate(whole)],
        "usage": usage,
        **({"metadata": metadata_of(first)} if first.metadata is not None else {}),
    }


def _choice(number: int, record: RequestRecord) -> dict[str, Any]:
    return {
        "index": number,
        "text": record.text,
        "finish_reason": record.finish,
        "logprobs": _logprobs(record) if record.top_tokens.size else None,
    }


def _chat_choice(number: int, record: RequestRecord) -> dict[str, Any]:
    return {
        "index": number,
        "message": {"role": "assistant", "content": record.text, "refusal": None},
        "finish_reason": record.finish,
        "logprobs": _chat_logprobs(record) if record.top_tokens.size else None,
    }


def _logprobs(record: RequestRecord) -> dict[str, Any]:
    return {
        "tokens": [_token(token) for token in record.tokens.tolist()],
        "token_logprobs": [_finite(logprob) for logprob in record.logprobs.tolist()],
        "top_logprobs": [dict(top) for top in _top(record)],
    }


def _chat_logprobs(record: RequestRecord) -> dict[str, Any]:
    own = zip(record.tokens.tolist(), record.logprobs.tolist(), _top(record), strict=True)
    content = [
        _chat_token(_token(token), _finite(logprob)) | {"top_logprobs": [_chat_token(*pair) for pair in top]}
        for token, logprob, top in own
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": None}


def _top(record: RequestRecord) -> list[list[tuple[str, float]]]:
    """The likeliest tokens at each token, and their log-probabilities."""
    return [
        [(_token(token), _finite(logprob)) for token, logprob in zip(tokens, logprobs, strict=True)]
        for tokens, logprobs in zip(record.top_tokens.tolist(), record.top_logprobs.tolist(), strict=True)
    ]


def _token(number: int) -> str:
    return f"token_id:{number}"


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST_LOGPROB


def _seconds(text: Any) -> int:
    """A time of ISO 8601 in seconds since the epoch; 0 if it is none."""
    try:
        return int(datetime.fromisoformat(str(text)).timestamp())
    except (ValueError, OverflowError):
        return 0
