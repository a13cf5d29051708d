"""Export of results as JSON lines, for programs that do not read HDF5."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from moempi.storage.files import atomic
from moempi.storage.records import RequestRecord
from moempi.storage.results import ResultFile


def export(results_path: str | Path, out_jsonl: str | Path) -> int:
    """Write one JSON object per request, in input order, atomically; returns the number of requests.

    NaN and infinity become null. Raises NoInputError or DataError for the results file, StorageError if the output
    cannot be written.
    """
    with ResultFile(results_path) as results, atomic(out_jsonl) as temporary, temporary.open("wb") as file:
        for record in results.requests():
            file.write(msgspec.json.encode(dict(_fields(record))) + b"\n")
        return results.num_requests


def _fields(record: RequestRecord) -> Iterator[tuple[str, Any]]:
    yield "id", record.id
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
    for name in ("first_token_s", "end_to_end_s"):
        if getattr(record, name) is not None:
            yield name, getattr(record, name)
    if record.reference is not None:
        yield "reference", record.reference
