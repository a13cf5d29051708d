"""Export of results as JSON lines, for programs that do not read HDF5."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from moempi.errors import DataError, StorageError
from moempi.printing import printable_json
from moempi.storage.files import atomic
from moempi.storage.records import RequestRecord, Scores
from moempi.storage.results import ResultFile

STDOUT = "-"
"""The name of stdout as an output."""


def own_lines(results: ResultFile) -> Iterator[dict[str, Any]]:
    """Yield one object per request, in input order."""
    for record in results.requests():
        yield dict(_fields(record))


def export(
    results_path: str | Path,
    out_jsonl: str | Path,
    *,
    lines: Callable[[ResultFile], Iterator[dict[str, Any]]] = own_lines,
) -> int:
    """Write the objects of `lines`, atomically or to STDOUT; returns the number of requests.

    NaN and infinity become null. Raises NoInputError or DataError for the results file, StorageError if the output
    cannot be written.
    """
    with ResultFile(results_path) as results:
        encoded = (msgspec.json.encode(line) + b"\n" for line in lines(results))
        if str(out_jsonl) == STDOUT:
            _print(encoded)
        else:
            with atomic(out_jsonl) as temporary, temporary.open("wb") as file:
                file.writelines(encoded)
        return results.num_requests


def metadata_of(record: RequestRecord) -> msgspec.Raw:
    """The metadata of a request as JSON; raises DataError if it is none."""
    text = (record.metadata or "").encode()
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DataError(f"request {record.index}: its metadata is not JSON: {error}") from error
    return msgspec.Raw(text)


def _print(encoded: Iterable[bytes]) -> None:
    """Print lines of JSON on stdout, whatever its encoding."""
    stream = sys.stdout.buffer
    try:
        for line in encoded:
            stream.write(printable_json(line))
        stream.flush()
    except OSError as error:
        with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # the interpreter flushes stdout once more
        raise StorageError(f"stdout: cannot be written: {error.strerror}") from error


def _fields(record: RequestRecord) -> Iterator[tuple[str, Any]]:
    yield "id", record.id
    if record.prompt_id is not None:
        yield "prompt_id", record.prompt_id
    yield "finish", record.finish
    if record.error:
        yield "error", record.error
    yield "prompt_tokens", len(record.prompt)
    yield "text", record.text
    yield "tokens", record.tokens.tolist()
    yield "logprobs", record.logprobs.tolist()
    for name in ("top_tokens", "top_logprobs", "score", "score_top_tokens", "score_top_logprobs"):
        rows = getattr(record, name)
        if rows.size:
            yield name, rows.tolist()
    if record.score.size:
        scores = Scores.of(record.score)
        yield from (("score_sum", scores.sum), ("score_mean", scores.mean), ("perplexity", scores.perplexity))
    for name in ("first_token_s", "end_to_end_s"):
        if getattr(record, name) is not None:
            yield name, getattr(record, name)
    if record.reference is not None:
        yield "reference", record.reference
    if record.metadata is not None:
        yield "metadata", metadata_of(record)
