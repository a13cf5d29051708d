"""Safe reading and writing of HDF5 files.

HDF5 can refer to data outside a file (external storage, external links, virtual datasets), declare petabytes in a few
bytes (chunks, filters, fill values) and run code on reading (filter plugins). A dataset is therefore accepted only if
all links on its path are hard links and it is contiguous, unfiltered, inside the file, and of the expected type and
shape.
"""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5g, h5l, h5o, h5p, h5s, h5t

from moempi.arrays import aligned_empty
from moempi.config.input_file import open_input
from moempi.errors import DataError, NoInputError
from moempi.storage.files import start_writing

AnyArray = npt.NDArray[Any]

# The oldest file format with checksums of metadata; every HDF5 library since 1.10 reads it.
WRITE_VERSION = ("v110", "v110")
WRITEBACK_BYTES = 32 << 20
_LOCKING = "HDF5_USE_FILE_LOCKING"  # if TRUE, HDF5 locks what it was asked not to lock
_LOCK_REFUSED = "unable to lock file"
MAX_DEPTH = 16
MAX_OBJECTS = 1_000_000
MAX_ATTRIBUTE_BYTES = 1 << 16


def _bfloat16() -> Any:
    """The file type of bfloat16: 1 sign, 8 exponent and 7 mantissa bits, which every HDF5 tool reads as a number."""
    kind = h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_ebias(127)
    kind.lock()
    return kind


FILE_TYPES = {
    "bfloat16": _bfloat16(),
    "float32": h5t.IEEE_F32LE,
    "uint8": h5t.STD_U8LE,
    "uint64": h5t.STD_U64LE,
}
MEMORY_TYPES = {"bfloat16": np.uint16, "float32": np.float32, "uint8": np.uint8, "uint64": np.uint64}


@contextmanager
def raising_data_errors(path: str | Path, what: str = "") -> Iterator[None]:
    """Raise h5py's errors about a damaged file as DataError that names the file and the object `what`."""
    try:
        yield
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, OverflowError) as error:
        raise DataError(f"{path}: {f'{what}: ' if what else ''}damaged or not as written: {error}") from error


def open_file(path: str | Path) -> Any:
    """Open an HDF5 file for reading, without file locks because files are immutable; returns an h5py.File.

    Raises NoInputError if the file is missing, unreadable or cannot be locked, DataError if it is not HDF5.
    """
    open_input(path).close()
    with raising_data_errors(path):
        try:
            return h5py.File(path, "r", locking=False)
        except OSError as error:
            if _LOCK_REFUSED not in str(error):
                raise
            remedy = f"unset {_LOCKING} or set it to FALSE"
            raise NoInputError(f"{path}: cannot be read: HDF5 gets no lock on it; {remedy}: {error}") from error


def has_format(path: Path, name: str) -> bool:
    """Whether `path` is an HDF5 file whose attribute `format` is `name`."""
    try:
        with open_file(path) as file:
            return read_attribute(file, "format") == name
    except (DataError, NoInputError):
        return False


def has(file: Any, name: str) -> bool:
    """Whether the root has a link `name`, whatever it leads to."""
    root = file["/"].id
    return bool(root.links.exists(name.encode()))


def walk(file: Any) -> Iterator[tuple[str, bool]]:
    """Yield (name, whether it is a group) of every object below the root, parents first; names like `layers/000/q`.

    Raises DataError at a link that is not hard, a group reached twice, an object that is neither group nor dataset, or
    a tree of more than MAX_DEPTH levels or MAX_OBJECTS objects.
    """
    with raising_data_errors(file.filename):
        root = file["/"].id
        visited = {h5o.get_info(root).addr}
        pending = [(root, "", 1)]
        count = 0
        while pending:
            group, prefix, depth = pending.pop()
            for name in sorted(group):
                count += 1
                path = prefix + _text(name, file.filename)
                is_group = _is_group(group, name, f"{file.filename}: {path}")
                yield path, is_group
                if is_group:
                    child = h5g.open(group, name)
                    address = h5o.get_info(child).addr
                    if address in visited or depth >= MAX_DEPTH or count > MAX_OBJECTS:
                        raise DataError(f"{file.filename}: {path}: groups contain each other or are too many")
                    visited.add(address)
                    pending.append((child, f"{path}/", depth + 1))


def open_dataset(file: Any, name: str) -> Any:
    """Open the dataset `name` through hard links only; returns an h5py.h5d.DatasetID.

    Raises DataError for any other link on the path, and for storage that is not contiguous, has external files or
    filters, has another size than type and shape require, or extends beyond the end of the file.
    """
    label = f"{file.filename}: {name}"
    with raising_data_errors(file.filename, name):
        group = file["/"].id
        *parents, last = name.encode().split(b"/")
        for parent in parents:
            _require_hard(group, parent, label)
            group = h5g.open(group, parent)
        _require_hard(group, last, label)
        dataset = h5d.open(group, last)
        problem = _storage_problem(dataset, os.fstat(file.id.get_vfd_handle()).st_size)
    if problem:
        raise DataError(f"{label}: {problem}")
    return dataset


def checked_dataset(file: Any, name: str, *, dtype: str, shape: tuple[int, ...]) -> Any:
    """Open the dataset `name` of type `dtype` (a key of FILE_TYPES) and `shape`; returns an h5py.h5d.DatasetID.

    Raises DataError for another type or shape, or as `open_dataset` does.
    """
    dataset = open_dataset(file, name)
    if not dataset.get_type().equal(FILE_TYPES[dtype]):
        raise DataError(f"{file.filename}: {name}: its type is not {dtype}")
    if tuple(dataset.shape) != shape:
        raise DataError(f"{file.filename}: {name}: its shape is {tuple(dataset.shape)}, not {shape}")
    return dataset


def read_rows(dataset: Any, start: int, stop: int, *, dtype: str) -> AnyArray:
    """Read rows [start, stop) of a checked dataset into new memory aligned to 64 bytes; bfloat16 as uint16 bits."""
    shape = (stop - start, *dataset.shape[1:])
    rows = aligned_empty(shape, MEMORY_TYPES[dtype])
    if rows.size:
        dataset.read(*_selection(dataset, start, shape), rows, mtype=FILE_TYPES[dtype])
    return rows


def read_vector(file: Any, name: str, *, dtype: str, limit: int) -> AnyArray:
    """Read a one-dimensional dataset of at most `limit` entries; raises DataError if it is anything else."""
    with raising_data_errors(file.filename, name):
        shape = tuple(open_dataset(file, name).shape)
        if len(shape) != 1 or shape[0] > limit:
            raise DataError(f"{file.filename}: {name}: its shape is {shape}, not one axis of at most {limit}")
        return read_rows(checked_dataset(file, name, dtype=dtype, shape=shape), 0, shape[0], dtype=dtype)


def read_attribute(file: Any, name: str, *, owner: Any = None) -> str | int | float | None:
    """A scalar attribute of the root (or of the object `owner`): fixed-length text, integer or float; None if absent.

    Raises DataError for variable-length text, for arrays, and beyond MAX_ATTRIBUTE_BYTES bytes.
    """
    with raising_data_errors(file.filename, f"attribute {name}"):
        holder = file["/"].id if owner is None else owner
        if not h5a.exists(holder, name.encode()):
            return None
        attribute = h5a.open(holder, name.encode())
        kind = attribute.get_type()
        plain = isinstance(kind, (h5t.TypeIntegerID, h5t.TypeFloatID)) or _is_fixed_text(kind)
        if not plain or attribute.get_space().get_simple_extent_npoints() != 1:
            raise DataError(f"{file.filename}: attribute {name}: is not one number or fixed-length text")
        if kind.get_size() > MAX_ATTRIBUTE_BYTES:
            raise DataError(f"{file.filename}: attribute {name}: is longer than {MAX_ATTRIBUTE_BYTES} bytes")
        value = np.empty(attribute.shape, attribute.dtype)
        attribute.read(value)
        entry = value.reshape(-1)[0].item()
        return _text(entry, file.filename) if isinstance(entry, bytes) else entry


@contextmanager
def create_file(path: Path) -> Iterator[tuple[Any, Callable[[], None]]]:
    """Write a new HDF5 file over the existing file `path`; gives an h5py.File and a function `require_success`.

    `require_success` raises the first OSError of writing. Call it from time to time in a long block; a block that
    succeeds ends with it. The file is always closed.
    """
    with _Output(path) as output:
        with h5py.File(output, "w", libver=WRITE_VERSION) as file:
            yield file, output.require_success
        output.require_success()


def create_dataset(file: Any, name: str, *, dtype: str, shape: tuple[int, ...]) -> Any:
    """Create the contiguous dataset `name` and its groups, and allocate it at once; returns a DatasetID."""
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.CONTIGUOUS)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)
    path, _, last = name.rpartition("/")
    group = file.require_group(path or "/")
    return h5d.create(group.id, last.encode(), FILE_TYPES[dtype], h5s.create_simple(shape), creation)


def write_rows(dataset: Any, start: int, rows: AnyArray, *, dtype: str) -> None:
    """Write rows (bfloat16 as uint16 bits) at row `start` of a dataset from `create_dataset`; raises OSError."""
    if rows.dtype != MEMORY_TYPES[dtype] or rows.shape[1:] != tuple(dataset.shape[1:]):
        raise ValueError(f"{rows.dtype}{rows.shape} cannot be rows of a {dtype} dataset of shape {dataset.shape}")
    if rows.size:
        contiguous = np.ascontiguousarray(rows)
        dataset.write(*_selection(dataset, start, rows.shape), contiguous, mtype=FILE_TYPES[dtype])


def write_attribute(file: Any, name: str, value: str | int, *, owner: Any = None) -> None:
    """Write a scalar attribute of the root (or of the object `owner`): text as fixed-length UTF-8, or an integer."""
    holder = file["/"].id if owner is None else owner
    if isinstance(value, int):
        kind, stored = h5t.STD_I64LE, np.array(value, np.int64)
    else:
        encoded = value.encode()
        kind = h5t.C_S1.copy()
        kind.set_size(max(1, len(encoded)))
        kind.set_cset(h5t.CSET_UTF8)
        kind.set_strpad(h5t.STR_NULLPAD)
        stored = np.array(encoded, f"S{max(1, len(encoded))}")
    h5a.create(holder, name.encode(), kind, h5s.create(h5s.SCALAR)).write(stored, mtype=kind)


class _Output(io.FileIO):
    """A file for HDF5 to write to, which records the first failure instead of raising it.

    After a failed write HDF5 writes again when it closes the file and when the program exits, and crashes. Writeback
    to disk starts while the program computes more, which shortens the sync at the end.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r+")
        self._failure: OSError | None = None
        self._unflushed = 0

    def write(self, content: Any) -> int:
        """Write all of `content`, or nothing after the first failure."""
        rest = memoryview(content).cast("B")
        num_bytes = len(rest)
        try:
            while rest and not self._failure:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self._failure = error
        self._unflushed += num_bytes
        if self._unflushed >= WRITEBACK_BYTES:
            start_writing(self.fileno())
            self._unflushed = 0
        return num_bytes

    def flush(self) -> None:
        """Nothing is buffered; HDF5 flushes also after a failure."""

    def truncate(self, size: int | None = None) -> int:
        """Set the file's size, unless writing has failed."""
        try:
            return self.tell() if self._failure else super().truncate(size)
        except OSError as error:
            self._failure = error
            return self.tell()

    def require_success(self) -> None:
        """Raise the first OSError, if any."""
        if self._failure:
            raise self._failure


def _selection(dataset: Any, start: int, shape: tuple[int, ...]) -> tuple[Any, Any]:
    space = dataset.get_space()
    space.select_hyperslab((start, *(0 for _ in shape[1:])), shape)
    return h5s.create_simple(shape), space


def _is_group(group: Any, name: bytes, label: str) -> bool:
    _require_hard(group, name, label)
    kind = h5o.get_info(group, name).type
    if kind not in (h5o.TYPE_GROUP, h5o.TYPE_DATASET):
        raise DataError(f"{label}: is neither a group nor a dataset")
    return bool(kind == h5o.TYPE_GROUP)


def _require_hard(group: Any, name: bytes, label: str) -> None:
    if not group.links.exists(name):
        raise DataError(f"{label}: is missing")
    if group.links.get_info(name).type != h5l.TYPE_HARD:
        raise DataError(f"{label}: soft and external links are refused")


def _storage_problem(dataset: Any, file_bytes: int) -> str | None:
    """Why the storage of a dataset is refused, or None."""
    creation = dataset.get_create_plist()
    if creation.get_layout() != h5d.CONTIGUOUS:
        return "only contiguous storage is read (no chunks, compact or virtual datasets)"
    if creation.get_external_count():
        return "storage outside the file is refused"
    if creation.get_nfilters():
        return "filters are refused"
    if dataset.get_space().get_simple_extent_type() != h5s.SIMPLE:
        return "it is not a simple array"
    expected = prod(dataset.shape) * dataset.get_type().get_size()
    if dataset.get_storage_size() != expected:
        return f"it holds {dataset.get_storage_size()} bytes, its shape needs {expected}"
    offset = dataset.get_offset()
    if expected and (offset is None or offset + expected > file_bytes):
        return f"it reaches beyond the end of the file ({file_bytes} bytes): truncated?"
    return None


def _is_fixed_text(kind: Any) -> bool:
    return isinstance(kind, h5t.TypeStringID) and not kind.is_variable_str()


def _text(name: bytes, path: str) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a name or text is not UTF-8: {name!r}") from error
