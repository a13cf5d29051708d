"""A checkpoint folder in the hub's format: config.json, tokenizer.json, safetensors files. All content is untrusted."""

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError, safe_open

from moempi.arrays import aligned_empty
from moempi.config.input_file import file_mode, open_input, read_input
from moempi.errors import DataError, NoInputError
from moempi.storage.chat_templates import ChatTemplates, read_chat_templates
from moempi.storage.downloads import refuse_placeholder, refuse_short, refuse_unfinished, where_to_get
from moempi.storage.hdf5 import AnyArray
from moempi.storage.tokenizer_files import read_tokenizer

# The NumPy type of each safetensors type; bfloat16 and 8-bit floating point are kept as bits.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"
MAX_METADATA_BYTES = 1 << 28
HEADER_LENGTH_BYTES = 8
MAX_BEGIN_BYTES = 64


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of a safetensors file: `dtype` is the format's name, `offset` is in bytes from the file's start."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Size of one row (index of axis 0) in bytes."""
        return prod(self.shape[1:]) * NUMPY_TYPES[self.dtype].itemsize

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop): bits for BF16 and 8-bit types, else numbers; raises DataError if the file is short."""
        rows = aligned_empty((stop - start, *self.shape[1:]), NUMPY_TYPES[self.dtype])
        self._fill(rows[np.newaxis], self.offset + start * self.row_bytes, 0)
        return rows

    def read_columns(self, start: int, stop: int) -> AnyArray:
        """Columns [start, stop) of a matrix, as `read`."""
        rows, columns = self.shape
        if (start, stop) == (0, columns):
            return self.read(0, rows)
        part = aligned_empty((rows, stop - start), NUMPY_TYPES[self.dtype])
        self._fill(part, self.offset + start * part.itemsize, self.row_bytes)
        return part

    def _fill(self, parts: AnyArray, offset: int, step: int) -> None:
        """Read each of `parts` from the file, the first from `offset`, each next one `step` bytes further."""
        try:
            with self.path.open("rb", buffering=0) as file:
                for number, part in enumerate(parts):
                    file.seek(offset + number * step)
                    self._fill_one(file, part.reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise NoInputError(f"{self.path}: cannot be read: {error.strerror}") from error

    def _fill_one(self, file: FileIO, rest: memoryview) -> None:
        while rest:
            count = file.readinto(rest)
            if not count:
                raise DataError(f"{self.path}: {self.name}: the file ends before the tensor does")
            rest = rest[count:]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The contents of a checkpoint folder.

    `tokenizer` is the text of a tokenizer.json, "" without any, `chat` has the chat templates, None without any.
    """

    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: str
    chat: ChatTemplates | None
    tensors: Mapping[str, CheckpointTensor]

    @property
    def config_path(self) -> Path:
        """Path of the configuration, for messages."""
        return self.folder / "config.json"


class _HeaderEntry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a checkpoint folder except for the values of its tensors.

    Raises NoInputError for missing files. Raises DataError, naming file and tensor, for truncated files, overlapping
    tensors, unknown types, file names outside the folder, and an index that disagrees with the files.
    """
    folder = Path(folder)
    if not stat.S_ISDIR(file_mode(folder)):
        raise NoInputError(
            f"{folder}: is not a folder with a checkpoint (config.json, *.safetensors){where_to_get(folder)}"
        )
    if _is_named(folder / ADAPTER_FILE):
        raise DataError(
            f"{folder / ADAPTER_FILE}: the folder has an adapter (LoRA), which would not be applied; "
            f"merge it into the weights, or move it away"
        )
    config = _with_quantization(_read_object(folder / "config.json"), _read_optional(folder / "hf_quant_config.json"))
    tokenizer_config = _read_optional(folder / "special_tokens_map.json")
    tokenizer_config |= _read_optional(folder / "tokenizer_config.json")
    tokenizer = read_tokenizer(folder, tokenizer_config)
    return Checkpoint(
        folder,
        config,
        _read_optional(folder / "generation_config.json"),
        tokenizer,
        read_chat_templates(folder, tokenizer_config) if tokenizer else None,
        _read_headers(folder),
    )


def _with_quantization(config: dict[str, Any], modelopt: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what ModelOpt says in a file of its own, unless the configuration says it."""
    found = modelopt.get("quantization")
    if not isinstance(found, dict) or config.get("quantization_config"):
        return config
    return config | {"quantization_config": {"quant_method": "modelopt"} | found}


def _is_named(path: Path) -> bool:
    """Whether the folder names this file; what a link to nowhere names is missing, not left out."""
    return os.path.lexists(path)


def _read_object(path: Path) -> dict[str, Any]:
    content = read_input(path, limit=MAX_METADATA_BYTES, too_long=DataError)
    refuse_placeholder(path, content)
    try:
        if b"Infinity" in content or b"NaN" in content:
            content = _without_constants(content)
        return msgspec.json.decode(content, type=dict[str, Any])
    except (ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{path}: not a JSON object: {error}") from error


def _without_constants(content: bytes) -> bytes:
    """JSON in which NaN and Infinity, which Python writes though JSON lacks them, are objects as in transformers 5."""
    return msgspec.json.encode(json.loads(content, parse_constant=lambda name: {"__float__": name}))


def _read_optional(path: Path) -> dict[str, Any]:
    return _read_object(path) if _is_named(path) else {}


def _read_headers(folder: Path) -> dict[str, CheckpointTensor]:
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if _is_named(index):
        return _read_shards(folder, index)
    if _is_named(single):
        return {tensor.name: tensor for tensor in _read_header(single)}
    refuse_unfinished(single)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise DataError(f"{folder}: holds pickled weights, which can run code; save them as safetensors first")
    raise NoInputError(f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_shards(folder: Path, index: Path) -> dict[str, CheckpointTensor]:
    listed = _read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise DataError(f"{index}: weight_map is not an object of file names")
    if SINGLE_FILE not in listed.values() and _is_named(folder / SINGLE_FILE):
        raise DataError(
            f"{folder / SINGLE_FILE}: is beside {INDEX_FILE}, which names other files; move away what is not the model"
        )
    tensors: dict[str, CheckpointTensor] = {}
    for file in sorted(set(listed.values())):
        if Path(file).name != file or "\0" in file or not file.endswith(".safetensors"):
            raise DataError(f"{index}: {file!r} is not the name of a safetensors file in this folder")
        for tensor in _read_header(folder / file):
            if listed.get(tensor.name) != file:
                raise DataError(f"{folder / file}: {tensor.name}: {INDEX_FILE} does not say that it is here")
            tensors[tensor.name] = tensor
    for name, file in listed.items():
        if name not in tensors:
            raise DataError(f"{folder / file}: {name}: is missing, though {INDEX_FILE} says that it is here")
    return tensors


def _read_header(path: Path) -> list[CheckpointTensor]:
    """The tensors of one file; `safe_open` validates the header, then `_checked_tensor` checks each offset again."""
    refuse_unfinished(path)
    try:
        with open_input(path) as file:
            begin = file.read(MAX_BEGIN_BYTES)
            refuse_placeholder(path, begin)
            length = int.from_bytes(begin[:HEADER_LENGTH_BYTES], "little")
            file.seek(HEADER_LENGTH_BYTES)
            header = msgspec.json.decode(file.read(min(length, MAX_METADATA_BYTES)), type=dict[str, Any])
        header.pop("__metadata__", None)
        entries = msgspec.convert(header, dict[str, _HeaderEntry])
        ends = (entry.data_offsets[1] for entry in entries.values())
        refuse_short(path, HEADER_LENGTH_BYTES + length + max(ends, default=0))
        with safe_open(path, framework="numpy"):
            pass
    except OSError as error:
        raise NoInputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: truncated, or not a safetensors file: {error}") from error
    data_start = HEADER_LENGTH_BYTES + length
    return [_checked_tensor(path, name, entry, data_start) for name, entry in entries.items()]


def _checked_tensor(path: Path, name: str, entry: _HeaderEntry, data_start: int) -> CheckpointTensor:
    """Of a type that cannot be read, only the place is known: a tensor that the model leaves out may have any."""
    first, last = entry.data_offsets
    num_bytes = last - first
    if entry.dtype in NUMPY_TYPES:
        num_bytes = prod(entry.shape) * NUMPY_TYPES[entry.dtype].itemsize
    if (
        min(entry.shape, default=0) < 0
        or first < 0
        or last - first != num_bytes
        or data_start + last > path.stat().st_size
    ):
        raise DataError(f"{path}: {name}: its offsets {first} to {last} do not fit its shape {entry.shape} or the file")
    return CheckpointTensor(path, name, entry.dtype, entry.shape, data_start + first)
