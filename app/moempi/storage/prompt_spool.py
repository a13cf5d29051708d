"""The prompts of a job in order, of which a few MiB are in memory: the others are in a file that has no name."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import msgspec
import numpy as np

from moempi.config.job import Sampling
from moempi.errors import StorageError
from moempi.storage.closeable import Closeable
from moempi.storage.prompts import Prompt
from moempi.storage.records import replace_surrogates

BLOCK = 1024
BLOCK_BYTES = 1 << 20
"""Prompts, and bytes of them, that are written at a time; a larger prompt is written alone."""
MEMORY_BYTES = 32 << 20
"""Bytes of a spool that stay in memory, without a file."""

NUMBER_BYTES = 100
"""Memory of a number in a tuple or a mapping of Python."""
_LENGTH_BYTES = 8


_Stored = tuple[
    int,
    str,
    str | None,
    bytes | None,
    str | None,
    Sampling | None,
    str,
    bytes | None,
    str | None,
    str | None,
    str | None,
    str | None,
]
"""The fields of a `Prompt` in order; `sampling` is None if it is the default."""

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[_Stored])
_ARRAY = b"\xdd"
"""Begins an array of MessagePack, before its length in 4 bytes and what it holds."""


class PromptCodec:
    """Bytes of prompts, most of which have the `sampling` parameters of their job."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def encode(self, prompts: Iterable[Prompt]) -> bytes:
        """The bytes of prompts."""
        return self.join([self.encode_one(prompt) for prompt in prompts])

    def encode_one(self, prompt: Prompt) -> bytes:
        """The bytes of a prompt, for `join`."""
        stored: _Stored = (
            prompt.index,
            prompt.id,
            prompt.text,
            None if prompt.tokens is None else prompt.tokens.tobytes(),
            prompt.reference,
            None if prompt.sampling == self._sampling else prompt.sampling,
            replace_surrogates(prompt.error) if prompt.error else "",  # a path may be no UTF-8
            prompt.chat,
            prompt.metadata,
            prompt.prompt_id,
            prompt.group,
            prompt.replay,
        )
        return _ENCODER.encode(stored)

    def join(self, encoded: Sequence[bytes]) -> bytes:
        """The bytes of prompts from the bytes of each."""
        return b"".join((_ARRAY, len(encoded).to_bytes(4), *encoded))

    def decode(self, encoded: bytes | bytearray) -> list[Prompt]:
        """The prompts of bytes from `encode` or `join`."""
        return [
            Prompt(
                index,
                name,
                text,
                None if tokens is None else np.frombuffer(tokens, np.int32),
                reference,
                sampling or self._sampling,
                error,
                chat,
                metadata,
                prompt_id,
                group,
                replay,
            )
            for (
                index,
                name,
                text,
                tokens,
                reference,
                sampling,
                error,
                chat,
                metadata,
                prompt_id,
                group,
                replay,
            ) in _DECODER.decode(encoded)
        ]


class PromptSpool(Closeable):
    """Prompts in the order in which they were added; each iteration reads them anew.

    `folder` is where a file without a name holds them, if they take more than MEMORY_BYTES. Raises StorageError if it
    cannot be written or read.
    """

    def __init__(self, codec: PromptCodec, folder: str | Path) -> None:
        self._codec = codec
        self._folder = Path(folder)
        self._file: Any = SpooledTemporaryFile(max_size=MEMORY_BYTES, dir=str(folder))  # noqa: SIM115
        self._block: list[bytes] = []
        self._block_bytes = 0
        self._end = 0
        self._num_prompts = 0

    def __len__(self) -> int:
        return self._num_prompts

    def __iter__(self) -> Iterator[Prompt]:
        return chain.from_iterable(self._blocks())

    def append(self, prompt: Prompt) -> None:
        """Add a prompt."""
        encoded = self._codec.encode_one(prompt)
        self._block.append(encoded)
        self._num_prompts += 1
        self._block_bytes += len(encoded)
        if len(self._block) == BLOCK or self._block_bytes >= BLOCK_BYTES:
            self._write_block()

    def close(self) -> None:
        """Remove all prompts."""
        with suppress(OSError):  # of what could not be written
            self._file.close()
        self._block, self._end, self._num_prompts = [], 0, 0

    def _write_block(self) -> None:
        encoded = self._codec.join(self._block)
        try:
            self._file.seek(self._end)
            self._file.write(len(encoded).to_bytes(_LENGTH_BYTES))
            self._file.write(encoded)
            self._file.flush()
        except OSError as error:
            self.close()
            raise self._failure("written", error) from error
        self._end += _LENGTH_BYTES + len(encoded)
        self._block, self._block_bytes = [], 0

    def _blocks(self) -> Iterator[list[Prompt]]:
        offset = 0
        while offset < self._end:
            try:
                self._file.seek(offset)
                length = int.from_bytes(self._file.read(_LENGTH_BYTES))
                encoded = self._file.read(length)
            except OSError as error:
                raise self._failure("read", error) from error
            offset += _LENGTH_BYTES + length
            yield self._codec.decode(encoded)
        yield self._codec.decode(self._codec.join(self._block))

    def _failure(self, verb: str, error: OSError) -> StorageError:
        return StorageError(f"{self._folder}: a file of prompts in it cannot be {verb}: {error.strerror or error}")


def num_bytes(prompt: Prompt) -> int:
    """The size of what may be long in a prompt, about."""
    tokens = 0 if prompt.tokens is None else prompt.tokens.nbytes
    given = len(prompt.text or "") + len(prompt.chat or b"") + len(prompt.reference or "") + len(prompt.metadata or "")
    names = len(prompt.id) + len(prompt.prompt_id or "") + len(prompt.group or "") + len(prompt.replay or "")
    sampling = prompt.sampling
    numbers = len(sampling.logit_bias) + len(sampling.stop_token_ids)
    return tokens + given + names + len(prompt.error) + sum(map(len, sampling.stop)) + NUMBER_BYTES * numbers
