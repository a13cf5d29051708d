"""Prompts as lines of JSON; what a run makes of prompts."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from tempfile import gettempdir
from typing import Any

import numpy as np

from fuzz.mutation import damaged_text, mutated, to_json
from fuzz.seeds import ARCHITECTURE, JOB, TOKENIZER
from fuzz.subject import Subject, Use, require
from moempi.config.job import Sampling
from moempi.engine.admission import make_request
from moempi.engine.tokenizer import TextTokenizer
from moempi.printing import MAX_LINE_LENGTH
from moempi.storage.prompt_file import read_prompts
from moempi.storage.records import decode, encode

RUN = JOB.replace("none.h5", "weights.h5").replace("../seeds/prompts", "prompts").replace("../seeds/results", "results")


@cache
def tokenizer() -> TextTokenizer:
    return TextTokenizer(json.dumps(TOKENIZER), eos_tokens=(1,))


def use_prompts(path: str) -> None:
    """Read prompts, make them requests as a run does, and their records; raises as a strict run does."""
    prompts = list(read_prompts(path, sampling=Sampling(), strict=False, folder=gettempdir())[0])
    require([prompt.index for prompt in prompts] == list(range(len(prompts))), "indices do not count up")
    for prompt in prompts:
        if prompt.error:
            require(len(prompt.error) <= MAX_LINE_LENGTH, f"an error of {len(prompt.error)} characters")
            require(prompt.error.startswith(path), "an error does not name the file")
            require(prompt.text is prompt.tokens is prompt.chat is None, "a refused prompt has a text")
        else:
            given = [prompt.text, prompt.tokens, prompt.chat]
            require(sum(part is not None for part in given) == 1, "a prompt has not one of text, tokens and chat")
    names = [prompt.id for prompt in prompts if not prompt.error]
    require(len(set(names)) == len(names), "two requests have one id")
    for task in ("generate", "score"):
        for prompt in prompts:
            request = make_request(prompt, tokenizer(), ARCHITECTURE, task=task)
            if request.finish is None:
                request.uniform(len(request.prompt_tokens))
                request.logit_adjustment()
                require(
                    0 <= min(request.prompt_tokens) <= max(request.prompt_tokens) < ARCHITECTURE.vocab_size, "a token"
                )
            record = request.to_record(task=task)
            again = decode(encode(record))
            require(
                again.id == record.id and np.array_equal(again.prompt, request.prompt_tokens), "a record is another"
            )
    read_prompts(path, sampling=Sampling(), strict=True, folder=gettempdir())


LINES: list[dict[str, Any]] = [
    {"id": "a", "prompt": "12+34=", "reference": "46"},
    {"tokens": [5, 17, 9], "max_tokens": 4},
    {
        "id": "c",
        "prompt": "1+1=",
        "temperature": 0.7,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
    },
    {"prompt": "é\0 \U0001f9ee", "seed": 3, "stop": ["x", "\n"], "ignore_eos": True, "top_logprobs": 2},
    {"id": "e", "prompt": "<s></s><pad>"},
    {"id": 6, "prompt": "1+2=", "n": 3, "min_tokens": 2, "metadata": {"é": [1, None, 1e-7]}},
    {"prompt": "1+2=", "logit_bias": {"5": -1.5}, "presence_penalty": 0.5, "frequency_penalty": -0.5},
    {"messages": [{"role": "user", "content": "1+1="}]},
    {
        "custom_id": "h",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": ["1+3="], "max_tokens": 3, "stop": "x", "logprobs": 1, "stream": False},
    },
    {
        "custom_id": "i",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": "1"}], "logprobs": True, "logit_bias": {"3": 1}},
    },
    {
        "messages": [{"role": "user", "content": "<s>"}, {"role": "tool", "content": [{"text": None}], "name": 1.5}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "chat_template_kwargs": {"a": True},
        "stop_token_ids": [3],
    },
]
MONSTERS = (
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"prompt":' + b"[" * 50_000,
    b'{"id":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"tokens":[' + b"1," * 300_000 + b"1]}",
    b'{"prompt":"' + b"12+" * 100_000 + b'"}',
    b'{"prompt":"' + b" " * 100_000 + b'"}',
    b"\xef\xbb\xbf" * 3 + b"{}",
    b"\n" * 300_000,
    b'{"temperature":1e999,"prompt":"x"}',
    b'{"seed":' + b"9" * 100_000 + b',"prompt":"x"}',
    b'{"id":"' + b"\\u0000" * 1000 + b'","prompt":"x"}',
    b'{"id":"' + b"x" * 50_000 + b'","prompt":"1"}\n{"id":"' + b"x" * 50_000 + b'","prompt":"1"}',
    b'{"' + b"k" * 50_000 + b'":1,"prompt":"1"}',
    b'{"id":"a","id":"b","prompt":"1"}',
    b'{"prompt":"\\ud83e\\uddee"}',
    b'{"prompt":"\\ud83e"}',
    b'{"id":"line-2","prompt":"1"}\n{"prompt":"1"}',
)


class PromptLines(Subject):
    """Prompts as lines of JSON: made into requests."""

    name = "prompts"
    file = "prompts.jsonl"
    commands = ("run job.toml", "show job.toml")

    def write(self, random: Random) -> Any:
        Path("job.toml").write_text(RUN)
        lines = [dict(random.choice(LINES)) for _ in range(random.randrange(6))]
        for index, line in enumerate(lines):
            if "id" in line and random.random() < 0.9:
                line["id"] += index if isinstance(line["id"], int) else str(index)
        texts = [to_json(line) for line in (mutated(random, lines) if random.random() < 0.7 else lines)]
        if random.random() < 0.05:
            texts.insert(random.randrange(len(texts) + 1), random.choice(MONSTERS))
        text = b"\n".join(texts)
        Path("prompts.jsonl").write_bytes(damaged_text(random, text) if random.random() < 0.2 else text)

    def uses(self, _: Any) -> Sequence[Use]:
        return (lambda: use_prompts("prompts.jsonl"),)


SUBJECTS = (PromptLines,)
