"""Admission: a prompt becomes a request; one that the model cannot compute becomes an error record."""

from collections.abc import Mapping

import numpy as np

from moempi.arrays import IntArray
from moempi.backend.values import NO_TOKENS
from moempi.config.architecture import Architecture
from moempi.engine.chat import ChatText
from moempi.engine.request import Request
from moempi.engine.tokenizer import TextTokenizer
from moempi.errors import DataError
from moempi.storage.prompts import Prompt

NO_CHATS: Mapping[int, ChatText] = {}
FEW_TOKENS = 32
"""Python finds the largest of fewer tokens sooner than NumPy."""


def make_request(
    prompt: Prompt, tokenizer: TextTokenizer, architecture: Architecture, *, task: str, chat: ChatText | None = None
) -> Request:
    """The request of a prompt, which has failed if the model cannot compute it; `chat` is the text of a chat."""
    tokens: IntArray = NO_TOKENS
    error = prompt.error or (chat.error if chat else "") or _unknown_token(prompt, architecture)
    if not error:
        try:
            tokens = _encode(prompt, tokenizer, chat) if prompt.tokens is None else prompt.tokens
        except DataError as no_tokenizer:
            error = str(no_tokenizer)
    remaining = architecture.max_positions - len(tokens)
    limit = min(prompt.sampling.max_tokens, remaining) if task == "generate" else 0
    request = Request(prompt, tokens.astype(np.int32, copy=False), limit)
    error = error or _problem(tokens, remaining, architecture, task)
    if error:
        request.fail(error)
    return request


def _unknown_token(prompt: Prompt, architecture: Architecture) -> str:
    if not prompt.sampling.logit_bias and not prompt.sampling.stop_token_ids:
        return ""
    named = {"logit_bias": prompt.sampling.logit_bias, "stop_token_ids": prompt.sampling.stop_token_ids}
    for key, tokens in named.items():
        if (largest := max(tokens, default=0)) >= architecture.vocab_size:
            return f"{key}: token {largest} is beyond the model's vocabulary of {architecture.vocab_size}"
    return ""


def _encode(prompt: Prompt, tokenizer: TextTokenizer, chat: ChatText | None) -> IntArray:
    tokens = tokenizer.encode_chat(chat.text) if chat else tokenizer.encode(prompt.text or "")
    return np.array(tokens, np.int64)


def _problem(tokens: IntArray, remaining: int, architecture: Architecture, task: str) -> str:
    if not len(tokens):
        return "the prompt has no tokens"
    largest = max(tokens.tolist()) if len(tokens) < FEW_TOKENS else tokens.max()
    if largest >= architecture.vocab_size:
        return f"token {largest} is beyond the model's vocabulary of {architecture.vocab_size}"
    if remaining < (1 if task == "generate" else -1):  # the last token of a scored prompt needs no position
        return f"the prompt has {len(tokens)} tokens, the model has {architecture.max_positions} positions"
    return ""
