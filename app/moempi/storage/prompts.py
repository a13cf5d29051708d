"""The prompts of a job: lines of JSON, each a request; lines and rows of other forms; or token arrays in HDF5."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import accumulate, chain, pairwise
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import h5py
import msgspec
import numpy as np
from msgspec import UNSET, Meta, UnsetType, structs
from numpy.typing import NDArray

from moempi.arrays import Int32Array
from moempi.config.job import Sampling
from moempi.errors import DataError
from moempi.storage.hdf5 import open_dataset, open_file, raising_data_errors, walk
from moempi.storage.openai_batch import translate
from moempi.storage.prompt_form import PromptForm, find_form, open_decompressed
from moempi.storage.prompt_table import Row, csv_rows, parquet_rows
from moempi.storage.repeated import digest

MAX_LINE_BYTES = 64 << 20
MAX_TOKEN = 2**31 - 1
MAX_TOP_LOGPROBS = 20
"""Likeliest tokens that a line may request, if the job has fewer: the largest number widens all requests' columns."""
MAX_GROUP = 200
"""Characters of the name of a group."""
MAX_PATH = 4096
"""Characters of the path of a file."""
MAX_SHOWN = 100
"""Characters of a key or an id that an error shows."""

_ROWS = 1024
"""Rows of arrays whose offsets and ids are read at a time."""
_LINES_BYTES = 1 << 13
"""Bytes of lines that are read at a time, beside the rest of the last one."""
_SAMPLES, _ID_BYTES = 1024, 1 << 20
"""Samples, and characters of their ids, that are made at a time; one of a longer id is made alone."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UNKNOWN_FIELD = "Object contains unknown field `"

Token = Annotated[int, Meta(ge=0, le=MAX_TOKEN)]
NonEmpty = Annotated[str, Meta(min_length=1)]
Given = TypeVar("Given", bytes, Row)


class Prompt(msgspec.Struct, frozen=True, eq=False, gc=False):
    """One request: its `index` among the file's requests, and either `text`, `tokens` (n,) int32, n > 0, or a `chat`.

    A non-empty `error` is the reason why the line cannot be used; such a request has none of these and finishes
    immediately as an error. `metadata` is a JSON object as the file has it. `prompt_id` is the id of the prompt if this
    is its second sample or a later one.
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
    metadata: str | None = None
    prompt_id: str | None = None
    group: str | None = None
    """The group of prompts whose statistics it counts for."""
    replay: str | None = None
    """The file with the experts that its tokens use."""


class Chat(msgspec.Struct):
    """What a chat template is applied to: messages, each with a role, tools, and further variables of the template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = {}


_ABSENT = msgspec.Raw()


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    id: NonEmpty | int | None = None
    prompt: str | None = None
    tokens: Annotated[list[Token], Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reference: NonEmpty | None = None
    metadata: msgspec.Raw = _ABSENT
    group: Annotated[str, Meta(min_length=1, max_length=MAX_GROUP)] | None = None
    replay: Annotated[str, Meta(min_length=1, max_length=MAX_PATH, pattern="^[^\\x00]*$")] | None = None


Check = Callable[[Prompt], Prompt]
"""Returns a prompt as it is, or with an error."""
Place = Callable[[int], tuple[str, str]]
"""The place of the prompt of a number, as its errors name it, and the id that it has if it is given none."""
Numbered = Sequence[tuple[int, Prompt]]
"""A few prompts, each with the number of its line, row or object."""


class _OnlyId(msgspec.Struct):
    id: NonEmpty | int | None = None
    custom_id: NonEmpty | int | None = None


_OVERRIDES = {field.name: field.type for field in structs.fields(Sampling) if field.name != "defaults"}
_OVERRIDES_OF = attrgetter(*_OVERRIDES)
_LINE: type[Any] = msgspec.defstruct(
    "_Line",
    [(name, kind | UnsetType, UNSET) for name, kind in _OVERRIDES.items()],
    bases=(_Request,),
    forbid_unknown_fields=True,
)
_KEYS = tuple(field.name for field in structs.fields(_LINE))
_OF_BATCH = frozenset(_KEYS) - {"id", "prompt", "tokens", "messages", "reference", "group", "replay"}
_PLAIN: type[Any] = msgspec.defstruct(
    "_Plain",
    [
        (field.name, field.type, None)
        for field in structs.fields(_Request)
        if field.name in ("id", "prompt", "tokens", "reference", "group")
    ],
    forbid_unknown_fields=True,
    gc=False,
)
"""A line with none but the keys that most lines have; it means the same as a `_LINE`."""
_LINE_DECODER = msgspec.json.Decoder(_LINE)
_PLAIN_DECODER = msgspec.json.Decoder(_PLAIN)
_ID_DECODER = msgspec.json.Decoder(_OnlyId)


def accept(prompt: Prompt) -> Prompt:
    """The check that finds no error in any prompt."""
    return prompt


def find_prompts(
    path: str | Path, *, sampling: Sampling, column: str = "", repeated: Collection[int], check: Check = accept
) -> Iterator[list[Prompt]]:
    """The requests of a file in order, of any form that `find_form` knows, a few in memory at a time.

    See `read_prompts`. Only an id with one of the `repeated` digests is compared with earlier ones.
    """
    form = find_form(path, column=column)
    place = _of_lines(path) if form.name in _TO_LINE else _of_rows(path)
    return _with_indices(_read(path, form, place, sampling, column), place, sampling, repeated, check)


def make_prompts(rows: Iterable[Row], *, sampling: Sampling) -> list[Prompt]:
    """All requests of objects with the keys of a prompt line, the same as `read_prompts` makes of a file with them.

    Errors begin with the number of the object, as `prompts[3]`.
    """
    found = ([(number, _prompt(row, _object_line, _of_objects(number), sampling))] for number, row in enumerate(rows))
    return list(chain.from_iterable(_with_indices(found, _of_objects, sampling, None, accept)))


def _of_lines(path: str | Path) -> Place:
    return lambda number: (f"{path}:{number}", f"line-{number}")


def _of_rows(path: str | Path) -> Place:
    return lambda number: (f"{path}: row {number}", f"row-{number}")


def _of_objects(number: int) -> tuple[str, str]:
    return f"prompts[{number}]", f"line-{number + 1}"


def _with_indices(
    found: Iterable[Numbered], place: Place, sampling: Sampling, repeated: Collection[int] | None, check: Check
) -> Iterator[list[Prompt]]:
    """All samples of the prompts, with their indices; one with the id of an earlier one becomes an error.

    Only ids with one of the `repeated` digests can do so, if these are known. An error of `check` gets the place.
    """
    first_use: dict[str, int] = {}
    index = 0
    for block in found:
        samples, id_bytes = list[Prompt](), 0
        for number, prompt in block:
            for sample in _samples(prompt):
                if len(samples) == _SAMPLES or id_bytes > _ID_BYTES:
                    yield samples
                    samples, id_bytes = [], 0
                if repeated is None or (repeated and digest(sample.id) in repeated):
                    sample = _require_first(sample, number, first_use, place, sampling)
                checked = check(sample)
                error = checked.error
                if error and not sample.error:
                    error = f"{place(number)[0]}: {error}"
                samples.append(structs.replace(checked, index=index, error=error))
                index += 1
                id_bytes += len(sample.id)
        yield samples


def _require_first(sample: Prompt, number: int, first_use: dict[str, int], place: Place, sampling: Sampling) -> Prompt:
    """The sample, or an error if an earlier number has used its id."""
    first = first_use.setdefault(sample.id, number)
    if first == number or sample.error:
        return sample
    location, fallback = place(number)
    error = f"{location}: id {sample.id[:MAX_SHOWN]!r} was used before, at {place(first)[0]}"
    return _bad(fallback, sampling, error)


def _samples(prompt: Prompt) -> Iterable[Prompt]:
    """The prompt as its first sample, then the others; each id draws its own random numbers."""
    if prompt.sampling.n == 1 or prompt.error:
        return (prompt,)
    others = range(1, prompt.sampling.n)
    return chain(
        (prompt,), (structs.replace(prompt, id=f"{prompt.id}#{number}", prompt_id=prompt.id) for number in others)
    )


def _read(path: str | Path, form: PromptForm, place: Place, sampling: Sampling, column: str) -> Iterator[Numbered]:
    if form.name == "hdf5":
        yield from _read_arrays(path, place, sampling)
    elif form.name == "parquet":
        yield from _read_rows(parquet_rows(path, column=column), place, sampling)
    else:
        with open_decompressed(path, form.compression) as file:
            blocks = _line_blocks(file)
            if form.name == "csv":
                rows = csv_rows(_whole_lines(blocks, path), path=path, column=column, limit=MAX_LINE_BYTES)
                yield from _read_rows(rows, place, sampling)
            else:
                yield from _read_lines(blocks, place, sampling, form.name)


def _read_lines(blocks: Iterator[list[bytes]], place: Place, sampling: Sampling, name: str) -> Iterator[Numbered]:
    to_line, first = _TO_LINE[name], 1
    for lines in blocks:
        plain = _plain_prompts(lines, first, sampling) if name == "jsonl" else None
        yield plain or [
            (number, _prompt(line, to_line, place(number), sampling))
            for number, line in enumerate(lines, start=first)
            if line.strip()
        ]
        first += len(lines)


def _plain_prompts(lines: Sequence[bytes], first: int, sampling: Sampling) -> Numbered | None:
    """The prompts of JSON lines that all are `_PLAIN`, decoded together; None if one of them is not, or is wrong."""
    try:
        found = [_PLAIN_DECODER.decode(line) for line in lines]
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    if max(map(len, lines)) > MAX_LINE_BYTES or any((one.prompt is None) == (one.tokens is None) for one in found):
        return None
    given = [one.tokens or () for one in found]
    tokens = np.fromiter(chain.from_iterable(given), np.int32, sum(map(len, given)))
    ends = accumulate(map(len, given))
    return [
        (
            number,
            Prompt(
                0,
                f"line-{number}" if one.id is None else str(one.id),
                one.prompt,
                None if one.tokens is None else tokens[end - len(one.tokens) : end],
                one.reference,
                sampling,
                group=one.group,
            ),
        )
        for number, (one, end) in enumerate(zip(found, ends, strict=True), start=first)
    ]


def _read_rows(rows: Iterator[Row], place: Place, sampling: Sampling) -> Iterator[Numbered]:
    for number, row in enumerate(rows):
        yield [(number, _prompt(row, msgspec.json.encode, place(number), sampling))]


def _prompt(given: Given, to_line: Callable[[Given], bytes], place: tuple[str, str], sampling: Sampling) -> Prompt:
    location, fallback = place
    try:
        if isinstance(given, bytes) and len(given) > MAX_LINE_BYTES:
            raise msgspec.DecodeError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB")
        return _parse(to_line(given), fallback, sampling)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, TypeError, OverflowError) as error:
        return _bad(_name(given) or fallback, sampling, f"{location}: {_explain(error)}")


def _object_line(row: Row) -> bytes:
    return msgspec.json.encode(row, enc_hook=_plain)


def _plain(value: Any) -> Any:
    """The numbers of an array; raises TypeError for what JSON cannot hold."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"holds a {type(value).__name__}, which is no JSON")


def _text_line(line: bytes) -> bytes:
    return msgspec.json.encode({"prompt": line.removesuffix(b"\r").decode()})


_TO_LINE: dict[str, Callable[[bytes], bytes]] = {
    "jsonl": lambda line: line,
    "openai": lambda line: translate(line, known=_OF_BATCH),
    "text": _text_line,
}


def _line_blocks(file: BinaryIO) -> Iterator[list[bytes]]:
    """The lines without their ends and the byte order mark, a few at a time.

    Of a line of more than MAX_LINE_BYTES there are more than these, but not necessarily all.
    """
    mark: bytes = _BYTE_ORDER_MARK
    while read := file.read(_LINES_BYTES):
        if not read.endswith(b"\n"):
            read += _rest_of_line(file)
        lines = read.split(b"\n")
        if not lines[-1]:
            lines.pop()
        lines[0] = lines[0].removeprefix(mark)
        yield lines
        mark = b""


def _whole_lines(blocks: Iterable[list[bytes]], path: str | Path) -> Iterator[bytes]:
    """The lines, none of which is cut; raises DataError for one of more than MAX_LINE_BYTES."""
    for number, line in enumerate(chain.from_iterable(blocks), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{path}:{number}: is not CSV: the line is longer than {MAX_LINE_BYTES >> 20} MiB")
        yield line


def _rest_of_line(file: BinaryIO) -> bytes:
    """The rest of a line, of a longer one the first MAX_LINE_BYTES + 1 bytes; reads to its end."""
    rest = line = file.readline(MAX_LINE_BYTES + 1)
    while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_BYTES + 1)
    return rest


def _parse(line: bytes, fallback: str, sampling: Sampling) -> Prompt:
    request = _LINE_DECODER.decode(line)
    if [request.prompt, request.tokens, request.messages].count(None) != 2:
        raise msgspec.DecodeError("give either prompt, tokens or messages")
    limit = max(MAX_TOP_LOGPROBS, sampling.top_logprobs)
    if request.top_logprobs is not UNSET and request.top_logprobs > limit:
        raise msgspec.DecodeError(
            f"top_logprobs: {request.top_logprobs} is more than {limit}; raise sampling.top_logprobs in the job file"
        )
    values = _OVERRIDES_OF(request)
    given = {}
    if values.count(UNSET) < len(values):
        given = {key: value for key, value in zip(_OVERRIDES, values, strict=True) if value is not UNSET}
    return Prompt(
        index=0,
        id=fallback if request.id is None else str(request.id),
        text=request.prompt,
        tokens=None if request.tokens is None else np.array(request.tokens, np.int32),
        reference=request.reference,
        sampling=structs.replace(sampling, **given) if given else sampling,
        chat=_chat(request),
        metadata=None if request.metadata is _ABSENT else _object(request.metadata, "metadata"),
        group=request.group,
        replay=request.replay,
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


def _object(raw: msgspec.Raw, key: str) -> str | None:
    """The text of a JSON object, as it was given; None if it was not, or is null."""
    text = bytes(raw).strip()
    if text in (b"", b"null"):
        return None
    if not text.startswith(b"{"):
        raise msgspec.DecodeError(f"{key}: Expected `object`")
    msgspec.json.decode(text)  # a raw value has been skipped, not read
    return text.decode()


def _read_arrays(path: str | Path, place: Place, sampling: Sampling) -> Iterator[Numbered]:
    with open_file(path) as file, raising_data_errors(path):
        values, offsets = _integers(file, "values"), _integers(file, "offsets")
        _require_ascending(path, offsets, num_values=len(values))
        ids = _ids(file, num_rows=len(offsets) - 1) if "id" in dict(walk(file)) else None
        for first in range(0, len(offsets) - 1, _ROWS):
            bounds = offsets[first : first + _ROWS + 1].tolist()
            names = None if ids is None else ids[first : first + _ROWS].tolist()
            for row, (start, stop) in enumerate(pairwise(bounds)):
                location, fallback = place(first + row)
                name = fallback if names is None else _id_text(names[row])
                yield [(first + row, _row_prompt(values[start:stop], name, location, fallback, sampling))]


def _require_ascending(path: str | Path, offsets: h5py.Dataset, *, num_values: int) -> None:
    """Raise DataError if the offsets do not ascend from 0 to the number of values."""
    ascend = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == num_values
    for first in range(0, len(offsets), _ROWS):
        ascend = ascend and not (np.diff(offsets[first : first + _ROWS + 1].astype(np.int64)) < 0).any()
    if not ascend:
        raise DataError(f"{path}: offsets: do not ascend from 0 to the {num_values} entries of values")


def _row_prompt(tokens: NDArray[Any], name: str, location: str, fallback: str, sampling: Sampling) -> Prompt:
    if not len(tokens):
        return _bad(name or fallback, sampling, f"{location}: has no tokens")
    if tokens.min() < 0 or tokens.max() > MAX_TOKEN:
        return _bad(name or fallback, sampling, f"{location}: holds a number that is not a token id")
    if not name:
        return _bad(fallback, sampling, f"{location}: its id is empty or not UTF-8")
    return Prompt(0, name, None, tokens.astype(np.int32), None, sampling)


def _integers(file: Any, name: str) -> h5py.Dataset:
    dataset = h5py.Dataset(open_dataset(file, name))
    if dataset.dtype.kind not in "iu" or dataset.ndim != 1:
        raise DataError(f"{file.filename}: {name}: is {dataset.dtype} {dataset.shape}, not integers on one axis")
    return dataset


def _ids(file: Any, *, num_rows: int) -> h5py.Dataset:
    dataset = h5py.Dataset(open_dataset(file, "id"))
    if dataset.dtype.kind not in "iuS" or dataset.shape != (num_rows,):
        found = f"{file.filename}: id: is {dataset.dtype} {dataset.shape}"
        raise DataError(f"{found}, not ({num_rows},) integers or fixed-length strings")
    return dataset


def _id_text(entry: int | bytes) -> str:
    if isinstance(entry, int):
        return str(entry)
    try:
        return entry.decode()
    except UnicodeDecodeError:
        return ""


def _bad(name: str, sampling: Sampling, error: str) -> Prompt:
    return Prompt(index=0, id=name, text=None, tokens=None, reference=None, sampling=sampling, error=error)


def _name(given: bytes | Row) -> str | None:
    try:
        line = given if isinstance(given, bytes) else _object_line({"id": given.get("id")})
        found = None if len(line) > MAX_LINE_BYTES else _ID_DECODER.decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, TypeError, OverflowError):
        return None
    name = None if found is None else found.id if found.id is not None else found.custom_id
    return None if name is None else str(name)


def _explain(error: Exception) -> str:
    if isinstance(error, UnicodeError):
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
