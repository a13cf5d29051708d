"""Prompts, requests and sampled tokens for tests of the engine."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moempi.backend.values import SampledTokens
from moempi.config.job import Sampling
from moempi.engine.request import Request
from moempi.engine.tokenizer import TextTokenizer
from moempi.storage.prompts import Prompt
from mpirun import ROOT

EOS = 1


def abacus_tokenizer(*, eos_tokens: Sequence[int] = (EOS,), **special: bool) -> TextTokenizer:
    """The tokenizer of weights/abacus: one token for each character, special tokens 0 to 2."""
    text = (ROOT / "weights/abacus/tokenizer.json").read_text(encoding="utf-8")
    return TextTokenizer(text, eos_tokens=eos_tokens, **special)


def byte_tokenizer(*special: str, **settings: Any) -> TextTokenizer:
    """A tokenizer with a token for each byte and, after these, the special tokens."""
    return TextTokenizer(byte_tokenizer_text(*special), eos_tokens=(), **settings)


@cache
def byte_tokenizer_text(*special: str, **kinds: bool) -> str:
    """tokenizer.json of `byte_tokenizer`; `kinds` are those of AddedToken."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False, **kinds) for text in special])
    return str(tokenizer.to_str())


def make_prompt(
    text: str | None = None,
    *,
    tokens: Sequence[int] | None = None,
    index: int = 0,
    name: str = "q0",
    reference: str | None = None,
    error: str = "",
    **sampling: Any,
) -> Prompt:
    array = None if tokens is None else np.array(tokens, np.int32)
    return Prompt(index, name, text, array, reference, Sampling(**sampling), error)


def make_request(tokens: Sequence[int], limit: int, *, index: int = 0, name: str = "q0", **sampling: Any) -> Request:
    prompt = make_prompt(tokens=tokens, index=index, name=name, **sampling)
    return Request(prompt, np.array(tokens, np.int32), limit)


def make_sampled(tokens: Sequence[int], *, logprobs: Sequence[float] | None = None, top: int = 0) -> SampledTokens:
    """One row for each token t, with log-probability -t; the likeliest tokens of the row are t, t + 1, and so on."""
    array = np.array(tokens, np.int64)
    top_tokens = (array[:, None] + np.arange(top)).astype(np.int32)
    own = -array if logprobs is None else np.array(logprobs)
    return SampledTokens(array, own.astype(np.float32), top_tokens, -top_tokens.astype(np.float32))
