"""The input lines of OpenAI's batch API as prompt lines of this program.

https://platform.openai.com/docs/guides/batch: an object with `custom_id`, `method`, `url` and `body`, of which the body
is a request to /v1/completions or /v1/chat/completions.
"""

from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Raw

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

_WITHOUT_EFFECT = {
    "model",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "service_tier",
}
"""Fields that name the caller or the service: the job's weights serve any `model`."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "store": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "parallel_tool_calls": (True,),
    "tool_choice": ("auto",),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
}
"""Fields with the values that ask for what happens in any case."""
_NULL = b"null"


class _Line(msgspec.Struct):
    custom_id: Annotated[str, Meta(min_length=1)] | int
    body: dict[str, Raw]
    url: Literal["/v1/completions", "/v1/chat/completions"]
    method: Literal["POST"] = "POST"


_DECODER = msgspec.json.Decoder(_Line)


def translate(line: bytes, *, known: Collection[str]) -> bytes:
    """The prompt line for a line of a batch; fields of the body that are in `known` are passed on as they are.

    Raises msgspec.DecodeError, which names each field that cannot be honoured.
    """
    request = _DECODER.decode(line)
    given = {key: value for key, value in request.body.items() if bytes(value) != _NULL}
    fields: dict[str, Any] = {"id": request.custom_id}
    refused = []
    for key, value in given.items():
        if key == "prompt" and request.url == COMPLETIONS:
            fields |= _prompt(msgspec.json.decode(value))
        elif key == "messages" and request.url == CHAT:
            fields[key] = value
        elif key == "stop":
            stop = msgspec.json.decode(value)
            fields[key] = [stop] if isinstance(stop, str) else stop
        elif key in ("max_tokens", "max_completion_tokens"):
            fields["max_tokens"] = given.get("max_completion_tokens", value)
        elif key in ("logprobs", "top_logprobs"):
            fields["top_logprobs"] = _top_logprobs(given)
        elif key in known:
            fields[key] = value
        elif key not in _WITHOUT_EFFECT and not _is_neutral(key, value):
            refused.append(f"body.{key[:40]}")
    if refused:
        raise msgspec.DecodeError(f"{', '.join(refused[:10])}: not supported, leave out")
    return msgspec.json.encode(fields)


def _prompt(prompt: Any) -> dict[str, Any]:
    """The text or the tokens of a completion, which may be in a list of one."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]
    if isinstance(prompt, list) and any(isinstance(part, (str, list)) for part in prompt):
        raise msgspec.DecodeError(f"body.prompt: holds {len(prompt)} prompts; write a line for each")
    return {"tokens" if isinstance(prompt, list) else "prompt": prompt}


def _top_logprobs(given: dict[str, Raw]) -> Any:
    """The likeliest tokens to record: a number for a completion; for a chat, `logprobs` is a flag beside that number.

    At least 1, so that log-probabilities are exported; 0 if the flag is false.
    """
    flag = msgspec.json.decode(given.get("logprobs", Raw(b"true")))
    number = msgspec.json.decode(given.get("top_logprobs", Raw(b"1"))) if isinstance(flag, bool) else flag
    if flag is False:
        return 0
    return max(number, 1) if isinstance(number, int) else number


def _is_neutral(key: str, value: Raw) -> bool:
    return msgspec.json.decode(value) in _NEUTRAL.get(key, ())
