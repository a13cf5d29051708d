"""The process that tries a tokenizer: what it does with a text can end a process, and no exception is raised.

Rules of a tokenizer may make any text long beyond memory, and take any time. Here memory and time are limited. stdin
has the text of a tokenizer.json; stdout gets {} if the tokenizer can be used, else {"error": ...}, or nothing.
"""

import json
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from tokenizers import Tokenizer

MEMORY_BYTES = 2 << 30
LIMIT_S, BYTES_PER_S = 8, 1 << 20
"""Seconds of processor time, and bytes of the tokenizer for each further one."""
MAX_PROBES = 10_000
MAX_PROBE = 1000
"""Texts of the tokenizer's own rules that are tried, and characters of each."""
CHUNK = 256
PLANE = 0x10000
SURROGATES = range(0xD800, 0xE000)
RULES = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens")


def main() -> None:
    """Try the tokenizer on stdin."""
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    content = sys.stdin.buffer.read()
    _limit(resource.RLIMIT_CPU, LIMIT_S + len(content) // BYTES_PER_S)
    text = content.decode()
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:  # a panic of the library is no Exception
        reply({"error": str(error)})
        return
    _use(tokenizer, json.loads(text))
    reply({})


def reply(found: dict[str, str]) -> None:
    """Write a line of JSON on stdout, whatever the encoding of texts there."""
    sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
    sys.stdout.buffer.flush()


def _use(tokenizer: Any, rules: dict[str, Any]) -> None:
    """Encode what the rules name and every character of the first plane, decode every token; errors do not matter."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for probe in _probes(rules):
        for special in (True, False):
            with suppress(BaseException):
                tokenizer.encode_special_tokens = special
                tokenizer.encode(probe)
    size = tokenizer.get_vocab_size()
    for start in range(0, size, CHUNK):
        with suppress(BaseException):
            tokenizer.decode(list(range(start, min(start + CHUNK, size))), skip_special_tokens=False)


def _probes(rules: dict[str, Any]) -> Iterator[str]:
    found = list(dict.fromkeys(text for name in RULES for text in _texts(rules.get(name))))
    yield from found[:MAX_PROBES]
    for start in range(0, PLANE, CHUNK):
        yield "".join(chr(code) for code in range(start, start + CHUNK) if code not in SURROGATES)


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, also in its lists and objects, from their beginning."""
    if isinstance(value, str):
        yield value[:MAX_PROBE]
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _limit(kind: int, value: int) -> None:
    """Lower a limit of this process."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
