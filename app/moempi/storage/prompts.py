"""The prompts of a job: a JSONL file with one request per line, or token arrays in an HDF5 file."""

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import h5py
import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType
from numpy.typing import NDArray

from moempi.arrays import Int32Array
from moempi.config.input_file import open_input
from moempi.config.job import Sampling
from moempi.errors import DataError, NoInputError
from moempi.storage.hdf5 import open_dataset, open_file, raising_data_errors, walk

MAX_LINE_BYTES = 64 << 20
MAX_TOKEN = 2**31 - 1
MAX_TOP_LOGPROBS = 20
"""Likeliest tokens that a line may request, if the job has fewer: the largest number widens all requests' columns."""
MAX_SHOWN = 100
"""Characters of a key or an id that an error shows."""

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UNKNOWN_FIELD = "Object contains unknown field `"

Token = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
NonEmpty = Annotated[str, Meta(min_length=1)]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One request: its `index` among the file's requests, and either `text`, `tokens` (n,) int32, n > 0, or a `chat`.

    A non-empty `error` is the reason why the line cannot be used; such a request has none of these and finishes
    immediately as an error.
    """

    index: int
    id: str
    text: str | None
    tokens: Int32Array | None
    reference: str | None
    sampling: Sampling
    error: str = ""
    chat: bytes | None = None
    """JSON of a `Chat`, which takes less memory than its objects."""


class Chat(msgspec.Struct):
    """What a chat template is applied to: messages, each with a role, tools, and further variables of the template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    id: NonEmpty | None = None
    prompt: str | None = None
    tokens: Annotated[list[Token], Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reference: NonEmpty | None = None


class _OnlyId(msgspec.Struct):
    id: NonEmpty | None = None


_OVERRIDES = {field.name: field.type for field in msgspec.structs.fields(Sampling)}
_LINE: type[Any] = msgspec.defstruct(
    "_Line",
    [(name, kind | UnsetType, UNSET) for name, kind in _OVERRIDES.items()],
    bases=(_Request,),
    forbid_unknown_fields=True,
)
_KEYS = tuple(field.name for field in msgspec.structs.fields(_LINE))
_LINE_DECODER = msgspec.json.Decoder(_LINE)
_ID_DECODER = msgspec.json.Decoder(_OnlyId)


def read_prompts(path: str | Path, *, sampling: Sampling, strict: bool) -> list[Prompt]:
    """Read all requests of a file in order; a line may override the keys of `sampling`.

    A bad line, or a line with the id of an earlier one, becomes a `Prompt` with an error that names file and line; if
    `strict`, raises DataError instead. Raises NoInputError if the file cannot be read, DataError if an HDF5 file does
    not have the format in jobs/README.md.
    """
    prompts: list[Prompt] = []
    first_use: dict[str, str] = {}
    try:
        with open_input(path) as file:
            is_hdf5 = file.read(len(_HDF5_MAGIC)) == _HDF5_MAGIC
            file.seek(0)
            rows = _read_rows(path, sampling) if is_hdf5 else _read_lines(file, path, sampling)
            for location, fallback, prompt in rows:
                first = first_use.setdefault(prompt.id, location)
                if first is not location and not prompt.error:
                    error = f"{location}: id {prompt.id[:MAX_SHOWN]!r} was used before, at {first}"
                    prompt = _bad(prompt.index, fallback, sampling, error)
                if prompt.error and strict:
                    raise DataError(prompt.error)
                prompts.append(prompt)
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return prompts


def _read_lines(file: BinaryIO, path: str | Path, sampling: Sampling) -> Iterator[tuple[str, str, Prompt]]:
    index = 0
    for number, line in enumerate(_bounded_lines(file), start=1):
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        location, fallback = f"{path}:{number}", f"line-{number}"
        try:
            prompt = _parse(line, index, fallback, sampling)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            prompt = _bad(index, _name(line) or fallback, sampling, f"{location}: {_explain(error)}")
        yield location, fallback, prompt
        index += 1


def _bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line.removesuffix(b"\n")
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1) or b"\n"


def _parse(line: bytes, index: int, fallback: str, sampling: Sampling) -> Prompt:
    if len(line) > MAX_LINE_BYTES:
        raise msgspec.DecodeError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
    request = _LINE_DECODER.decode(line)
    if [request.prompt, request.tokens, request.messages].count(None) != 2:
        raise msgspec.DecodeError("give either prompt, tokens or messages")
    limit = max(MAX_TOP_LOGPROBS, sampling.top_logprobs)
    if request.top_logprobs is not UNSET and request.top_logprobs > limit:
        raise msgspec.DecodeError(
            f"top_logprobs: {request.top_logprobs} is more than {limit}; raise sampling.top_logprobs in the job file"
        )
    given = {key: value for key in _OVERRIDES if (value := getattr(request, key)) is not UNSET}
    return Prompt(
        index=index,
        id=request.id or fallback,
        text=request.prompt,
        tokens=None if request.tokens is None else np.array(request.tokens, np.int32),
        reference=request.reference,
        sampling=msgspec.structs.replace(sampling, **given) if given else sampling,
        chat=_chat(request),
    )


def _chat(request: Any) -> bytes | None:
    if request.messages is None:
        if request.tools is not None or request.chat_template_kwargs is not None:
            raise msgspec.DecodeError("tools and chat_template_kwargs are for a prompt of messages")
        return None
    for number, message in enumerate(request.messages):
        if not isinstance(message.get("role"), str):
            raise msgspec.DecodeError(f"messages[{number}]: has no role, which is a text")
    return msgspec.json.encode(Chat(request.messages, request.tools, request.chat_template_kwargs or {}))


def _read_rows(path: str | Path, sampling: Sampling) -> Iterator[tuple[str, str, Prompt]]:
    with open_file(path) as file, raising_data_errors(path):
        values, offsets = _integers(file, "values"), _integers(file, "offsets").astype(np.int64)
        if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
            raise DataError(f"{path}: offsets: do not ascend from 0 to the {len(values)} entries of values")
        ids = _ids(file, num_rows=len(offsets) - 1) if "id" in dict(walk(file)) else None
    for index, (start, stop) in enumerate(pairwise(offsets)):
        location, fallback = f"{path}: row {index}", f"row-{index}"
        tokens, name = values[start:stop], fallback if ids is None else ids[index]
        if not len(tokens):
            prompt = _bad(index, name or fallback, sampling, f"{location}: has no tokens")
        elif tokens.min() < 0 or tokens.max() > MAX_TOKEN:
            prompt = _bad(index, name or fallback, sampling, f"{location}: holds a number that is not a token id")
        elif not name:
            prompt = _bad(index, fallback, sampling, f"{location}: its id is empty or not UTF-8")
        else:
            prompt = Prompt(index, name, None, tokens.astype(np.int32), None, sampling)
        yield location, fallback, prompt


def _integers(file: Any, name: str) -> NDArray[Any]:
    dataset = h5py.Dataset(open_dataset(file, name))
    if dataset.dtype.kind not in "iu" or dataset.ndim != 1:
        raise DataError(f"{file.filename}: {name}: is {dataset.dtype} {dataset.shape}, not integers on one axis")
    return np.asarray(dataset[:])


def _ids(file: Any, *, num_rows: int) -> list[str]:
    dataset = h5py.Dataset(open_dataset(file, "id"))
    if dataset.dtype.kind not in "iuS" or dataset.shape != (num_rows,):
        found = f"{file.filename}: id: is {dataset.dtype} {dataset.shape}"
        raise DataError(f"{found}, not ({num_rows},) integers or fixed-length strings")
    return [_id_text(entry) for entry in dataset[:].tolist()]


def _id_text(entry: int | bytes) -> str:
    if isinstance(entry, int):
        return str(entry)
    try:
        return entry.decode()
    except UnicodeDecodeError:
        return ""


def _bad(index: int, name: str, sampling: Sampling, error: str) -> Prompt:
    return Prompt(index=index, id=name, text=None, tokens=None, reference=None, sampling=sampling, error=error)


def _name(line: bytes) -> str | None:
    try:
        return None if len(line) > MAX_LINE_BYTES else _ID_DECODER.decode(line).id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _explain(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    message, _, path = str(error).partition(" - at `$")
    if message.startswith(_UNKNOWN_FIELD):
        key = message.removeprefix(_UNKNOWN_FIELD)[:MAX_SHOWN].rstrip("`")
        near = get_close_matches(key, _KEYS, n=1, cutoff=0.5)
        return f"unknown key {key}; " + (f"did you mean {near[0]}?" if near else f"known keys are {', '.join(_KEYS)}")
    key = path.rstrip("`").lstrip(".")
    return f"{key}: {message}" if key else message
