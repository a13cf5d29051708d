"""Weight files: one self-contained HDF5 file per model, one checksum per block of rows (weights/README.md)."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from moempi.arrays import aligned_empty
from moempi.config.architecture import Architecture
from moempi.config.tensors import Tensor, catalogue
from moempi.errors import DataError
from moempi.storage import hdf5
from moempi.storage.chat_templates import ChatTemplates
from moempi.storage.closeable import Closeable
from moempi.storage.files import atomic, reserve
from moempi.storage.hdf5 import AnyArray

T = TypeVar("T")

FORMAT = "moempi weights"
VERSION = 1
TEXTS = {"architecture": 1 << 20, "catalogue": 1 << 26, "tokenizer": 1 << 28}
"""The UTF-8 texts of a file and the maximum size of each in bytes."""

CHAT, SAMPLING = "chat_templates", "sampling"
OPTIONAL_TEXTS = {CHAT: 1 << 26, SAMPLING: 1 << 16}
"""Texts that a file may lack, and their maximum size: JSON of `ChatTemplates`, and of the model's sampling rules."""

MAX_BLOCKS = 1 << 24
RESERVED_METADATA_BYTES = 1 << 20

OnProgress = Callable[[int, int], None]
"""Called with (bytes written so far, bytes in total) of the tensors."""


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in the catalogue that the file stores; its checksums begin at entry `first_block` of `checksums`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    block_rows: int
    first_block: int


class WeightFile(Closeable):
    """An open weight file: the model's architecture, and any range of rows of any tensor, verified by checksum.

    `tokenizer` is the text of tokenizer.json ("" if the model has none), `chat` the chat templates (None if it has
    none), `sampling` the keys of `[sampling]` that the model's maker recommends (None if there are none), `fingerprint`
    the hex digest of the file's contents. Use it as a context manager; threads must not share one.
    """

    def __init__(self, path: Path, file: Any, *, whole: bool) -> None:
        self.path = path
        self._file = file
        contents = _read_contents(file)
        self.architecture = _decode_architecture(contents["architecture"], path)
        self.fingerprint = _checked_fingerprint(file, contents)
        self.tokenizer = _decode_text(contents["tokenizer"], path)
        self.chat = _decode(contents, CHAT, ChatTemplates, path)
        self.sampling: dict[str, int | float] | None = _decode(contents, SAMPLING, dict[str, int | float], path)
        tensors = _checked_catalogue(self.architecture, contents["catalogue"], path)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._checksums = _split_checksums(tensors, contents["checksums"].view(np.uint64), path)
        self._datasets: dict[str, Any] = {}
        if whole:
            _require_no_others(file, tensors)
            for tensor in tensors:
                self._dataset(tensor.name)

    @classmethod
    def open(cls, path: str | Path, *, whole: bool = True) -> Self:
        """Open a weight file and verify everything except the rows of the tensors, which `read` verifies.

        If not `whole`, a tensor's dataset is verified when it is first needed, and nobody looks for objects that do not
        belong to the file: this is for a rank on whose node another rank opens the whole file. Raises NoInputError if
        the file cannot be read, DataError if it is not a complete, undamaged weight file of a supported version.
        """
        file = hdf5.open_file(path)
        try:
            with hdf5.raising_data_errors(path):
                return cls(Path(path), file, whole=whole)
        except BaseException:
            file.close()
            raise

    def tensor(self, name: str) -> Tensor:
        """Shape, type and blocks of the tensor `name`; raises KeyError if the model has no such tensor."""
        return self._tensors[name]

    def has(self, name: str) -> bool:
        """Whether the model has a tensor `name`."""
        return name in self._tensors

    def byte_range(self, name: str, start: int, stop: int) -> range:
        """Where the file has rows [start, stop) of the tensor `name`; raises DataError if its dataset is damaged."""
        tensor, offset = self._tensors[name], self._dataset(name).get_offset() or 0
        row_bytes = tensor.num_bytes // max(tensor.shape[0], 1)
        return range(offset + start * row_bytes, offset + stop * row_bytes)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> AnyArray:
        """Read rows [start, stop) of the tensor `name`: uint16 bits for bfloat16, else float32, aligned to 64 bytes.

        Reads whole blocks and compares each with its checksum. Raises DataError that names file, tensor and rows if a
        checksum differs, IndexError for rows that the tensor does not have. Blocks until the rows are in memory.
        """
        tensor = self._tensors[name]
        rows, block = tensor.shape[0], tensor.block_rows
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"{name} has rows 0 to {rows}, not {start} to {stop}")
        first = start // block * block
        last = min(-(-stop // block) * block, rows) if stop > start else first
        with hdf5.raising_data_errors(self.path, name):
            read = hdf5.read_rows(self._dataset(name), first, last, dtype=tensor.dtype)
        self._verify(tensor, first, read)
        if (first, last) == (start, stop):
            return read
        rows_read = aligned_empty((stop - start, *tensor.shape[1:]), read.dtype)
        rows_read[:] = read[start - first : stop - first]
        return rows_read

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._file.close()

    def _dataset(self, name: str) -> Any:
        """The dataset of a tensor; raises DataError if it is not as the catalogue says."""
        if name not in self._datasets:
            tensor = self._tensors[name]
            self._datasets[name] = hdf5.checked_dataset(
                self._file, f"tensors/{name}", dtype=tensor.dtype, shape=tensor.shape
            )
        return self._datasets[name]

    def _verify(self, tensor: Tensor, first: int, rows: AnyArray) -> None:
        starts, block = range(0, len(rows), tensor.block_rows), first // tensor.block_rows
        expected = self._checksums[tensor.name][block : block + len(starts)].tolist()
        for start, checksum in zip(starts, expected, strict=True):
            if xxhash.xxh3_64_intdigest(rows[start : start + tensor.block_rows].data) != checksum:
                span = f"{first + start} to {first + min(start + tensor.block_rows, len(rows))}"
                raise DataError(f"{self.path}: {tensor.name}: rows {span} are damaged, their checksum differs")


def write_weights(
    path: str | Path,
    architecture: Architecture,
    *,
    tokenizer: str,
    chat: ChatTemplates | None = None,
    sampling: Mapping[str, float] | None = None,
    tensors: Iterable[tuple[Tensor, Iterable[AnyArray]]],
    progress: OnProgress | None = None,
) -> str:
    """Write a weight file atomically and return its fingerprint.

    `tensors` yields the tensors of the architecture's catalogue in order, each as pieces of consecutive rows (bfloat16
    as uint16 bits), so memory holds one piece at a time. Raises StorageError if writing fails; an exception from
    `tensors` passes through and no file is left.
    """
    planned = catalogue(architecture)
    with atomic(path) as temporary, hdf5.create_file(temporary) as (file, require_success):
        texts = {
            "architecture": msgspec.json.encode(architecture),
            "catalogue": _encode_catalogue(planned),
            "tokenizer": tokenizer.encode(),
        }
        optional = {CHAT: chat, SAMPLING: sampling}
        texts |= {name: msgspec.json.encode(value) for name, value in optional.items() if value}
        for name, text in texts.items():
            dataset = hdf5.create_dataset(file, name, dtype="uint8", shape=(len(text),))
            hdf5.write_rows(dataset, 0, np.frombuffer(text, np.uint8), dtype="uint8")
        num_blocks = sum(tensor.num_blocks for tensor in planned)
        checksums = hdf5.create_dataset(file, "checksums", dtype="uint64", shape=(num_blocks,))
        datasets = {
            tensor.name: hdf5.create_dataset(file, f"tensors/{tensor.name}", dtype=tensor.dtype, shape=tensor.shape)
            for tensor in planned
        }
        file.flush()
        reserve(temporary, file.id.get_filesize() + RESERVED_METADATA_BYTES)
        digests = np.array(list(_write_tensors(planned, tensors, datasets, progress, require_success)), np.uint64)
        hdf5.write_rows(checksums, 0, digests, dtype="uint64")
        fingerprint = _fingerprint({**texts, "checksums": digests.tobytes()})
        hdf5.write_attribute(file, "format", FORMAT)
        hdf5.write_attribute(file, "version", VERSION)
        hdf5.write_attribute(file, "fingerprint", fingerprint)
    return fingerprint


def _write_tensors(
    planned: tuple[Tensor, ...],
    tensors: Iterable[tuple[Tensor, Iterable[AnyArray]]],
    datasets: dict[str, Any],
    progress: OnProgress | None,
    require_success: Callable[[], None],
) -> Iterator[int]:
    """Write every tensor and yield the checksums of its blocks."""
    done, total = 0, sum(tensor.num_bytes for tensor in planned)
    for expected, (tensor, pieces) in zip(planned, tensors, strict=True):
        if tensor != expected:
            raise ValueError(f"{tensor.name} was given where {expected.name} is due")
        blocks = _BlockChecksums(tensor.block_rows)
        row = 0
        for piece in pieces:
            hdf5.write_rows(datasets[tensor.name], row, piece, dtype=tensor.dtype)
            yield from blocks.add(piece)
            row += len(piece)
            done += piece.nbytes
            require_success()
            if progress:
                progress(done, total)
        if row != tensor.shape[0]:
            raise ValueError(f"{tensor.name} has {tensor.shape[0]} rows, {row} were given")
        yield from blocks.finish()


class _BlockChecksums:
    """Checksums of blocks of rows, where the pieces that are added need not end at block boundaries."""

    def __init__(self, block_rows: int) -> None:
        self._block_rows = block_rows
        self._filled = 0
        self._digest = xxhash.xxh3_64()

    def add(self, rows: AnyArray) -> Iterator[int]:
        start = 0
        while start < len(rows):
            piece = rows[start : start + self._block_rows - self._filled]
            self._digest.update(np.ascontiguousarray(piece).data)
            self._filled += len(piece)
            start += len(piece)
            if self._filled == self._block_rows:
                yield from self.finish()

    def finish(self) -> Iterator[int]:
        if self._filled:
            yield self._digest.intdigest()
            self._digest.reset()
            self._filled = 0


def _read_contents(file: Any) -> dict[str, AnyArray]:
    """Check format and version, then read the datasets beside the tensors as bytes."""
    found = hdf5.read_attribute(file, "format")
    if found != FORMAT:
        raise DataError(f"{file.filename}: is not a moempi weight file (write one with `moempi convert` or `init`)")
    version = hdf5.read_attribute(file, "version")
    if version != VERSION:
        raise DataError(
            f"{file.filename}: has format version {version}, this program reads {VERSION}: convert it again"
        )
    limits = TEXTS | {name: limit for name, limit in OPTIONAL_TEXTS.items() if hdf5.has(file, name)}
    texts = {name: hdf5.read_vector(file, name, dtype="uint8", limit=limit) for name, limit in limits.items()}
    checksums = hdf5.read_vector(file, "checksums", dtype="uint64", limit=MAX_BLOCKS)
    return {**texts, "checksums": checksums.view(np.uint8)}


def _decode_architecture(text: AnyArray, path: Path) -> Architecture:
    try:
        architecture = msgspec.json.decode(text.data, type=Architecture)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: architecture: {error}") from error
    problem = architecture.problem()
    if problem:
        raise DataError(f"{path}: architecture: {problem}")
    return architecture


def _decode_text(text: AnyArray, path: Path) -> str:
    try:
        return text.tobytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: tokenizer: is not UTF-8 text") from error


def _decode(contents: dict[str, AnyArray], name: str, kind: type[T], path: Path) -> T | None:
    """An optional text as a `kind`; None if the file lacks it."""
    try:
        return msgspec.json.decode(contents[name].data, type=kind) if name in contents else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: {name}: {error}") from error


def _encode_catalogue(tensors: tuple[Tensor, ...]) -> bytes:
    entries, first_block = [], 0
    for tensor in tensors:
        entries.append(
            Entry(tensor.name, tensor.dtype, tensor.shape, tensor.transposed, tensor.block_rows, first_block)
        )
        first_block += tensor.num_blocks
    return msgspec.json.encode(entries)


def _checked_catalogue(architecture: Architecture, text: AnyArray, path: Path) -> tuple[Tensor, ...]:
    """The architecture's catalogue; raises DataError if the file's catalogue differs."""
    try:
        entries = msgspec.json.decode(text.data, type=list[Entry])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path}: catalogue: {error}") from error
    if architecture.num_layers > len(entries):
        raise DataError(f"{path}: catalogue: has fewer tensors than the architecture has layers")
    tensors = catalogue(architecture)
    if _encode_catalogue(tensors) != text.tobytes():
        raise DataError(f"{path}: catalogue: does not list the tensors of the architecture")
    return tensors


def _fingerprint(contents: dict[str, Any]) -> str:
    digest = blake2b(f"{FORMAT} {VERSION}".encode(), digest_size=16)
    for name in (*TEXTS, *(name for name in OPTIONAL_TEXTS if name in contents), "checksums"):
        digest.update(len(contents[name]).to_bytes(8, "little"))
        digest.update(contents[name])
    return digest.hexdigest()


def _checked_fingerprint(file: Any, contents: dict[str, AnyArray]) -> str:
    fingerprint = _fingerprint(contents)
    if hdf5.read_attribute(file, "fingerprint") != fingerprint:
        raise DataError(f"{file.filename}: is damaged or was not written to its end, its fingerprint differs")
    return fingerprint


def _split_checksums(
    tensors: tuple[Tensor, ...], checksums: NDArray[np.uint64], path: Path
) -> dict[str, NDArray[np.uint64]]:
    """The checksums of the blocks of each tensor."""
    ends = np.cumsum([tensor.num_blocks for tensor in tensors])
    if len(checksums) != ends[-1]:
        raise DataError(f"{path}: checksums: there are {len(checksums)}, not one a block")
    return dict(zip((tensor.name for tensor in tensors), np.split(checksums, ends[:-1]), strict=True))


def _require_no_others(file: Any, tensors: tuple[Tensor, ...]) -> None:
    """Raise DataError if the file has an object that is not of these tensors."""
    datasets = {f"tensors/{tensor.name}" for tensor in tensors} | {*TEXTS, *OPTIONAL_TEXTS, "checksums"}
    groups, inner = set[str](), datasets
    while inner:
        inner = {name.rpartition("/")[0] for name in inner} - {""}
        groups |= inner
    for name, is_group in hdf5.walk(file):
        if name not in (groups if is_group else datasets):
            raise DataError(f"{file.filename}: {name}: does not belong to this architecture")
