"""The request queue of a rank: its share of the prompts, as sequences that can be computed or as finished errors."""

from collections.abc import Iterable

from moempi.config.architecture import Architecture
from moempi.engine.request import Request
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import DataError
from moempi.model.kv_cache import pages_for
from moempi.storage.prompts import Prompt


def make_requests(
    prompts: Iterable[Prompt], tokenizer: TextTokenizer, architecture: Architecture, *, task: str
) -> list[Request]:
    """Turn prompts into sequences; those that the model cannot take are finished, as errors."""
    return [_make_request(prompt, tokenizer, architecture, task) for prompt in prompts]


def refuse_too_long(requests: Iterable[Request], *, pages: int) -> list[Request]:
    """Fail the sequences that would not fit in the whole cache, and return them: a larger one could take them."""
    refused = [sequence for sequence in requests if sequence.finish is None and pages_for(sequence.capacity) > pages]
    for sequence in refused:
        sequence.fail(
            f"needs {pages_for(sequence.capacity)} cache pages, the rank has {pages}; "
            "raise run.kv_memory or lower max_tokens"
        )
    return refused


def _make_request(prompt: Prompt, tokenizer: TextTokenizer, architecture: Architecture, task: str) -> Request:
    tokens: list[int] = []
    error = prompt.error
    if not error:
        try:
            tokens = tokenizer.encode(prompt.text or "") if prompt.tokens is None else prompt.tokens.tolist()
        except DataError as refusal:
            error = str(refusal)
    remaining = architecture.max_positions - len(tokens)
    sequence = Request(prompt, tokens, min(prompt.sampling.max_tokens, remaining) if task == "generate" else 0)
    error = error or _problem(tokens, remaining, architecture, task)
    if error:
        sequence.fail(error)
    return sequence


def _problem(tokens: list[int], remaining: int, architecture: Architecture, task: str) -> str:
    if not tokens:
        return "the prompt has no tokens"
    if max(tokens) >= architecture.vocab_size:
        return f"token {max(tokens)} is beyond the model's vocabulary of {architecture.vocab_size}"
    if remaining < (1 if task == "generate" else 0):
        return f"the prompt has {len(tokens)} tokens, the model has {architecture.max_positions} positions"
    return ""
