"""Changes of HDF5 files: of their objects, through the library, and of their bytes, with checksums renewed."""

import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5p, h5s, h5t

from fuzz.mutation import damaged

INTEGERS = (0, -1, 1, 2, 5, 100, 2**31 - 1, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63), 2**63, 2**64 - 1)
FLOATS = (0.0, -1.0, 1.5, float("nan"), float("inf"), float("-inf"), 1e300, 5e-324, -0.0)
TEXTS = (b"", b"a", b"\xff\xfe", b"\xed\xa0\x80", b"a\0b", b"\x1b[2J", b"[/red]", b"x" * 300)
TYPES: tuple[Any, ...] = (
    "i1", "u1", "<i2", ">i4", "<i8", ">i8", "<u8", "<f2", ">f4", "<f8", "<c8", "S1", "S8", "?", "V3",
    h5py.string_dtype(), h5py.ref_dtype, h5py.regionref_dtype, h5py.vlen_dtype(np.int32), h5py.enum_dtype({"a": 1}),
    np.dtype([("a", "i4")]), np.dtype(("i4", (2,))), h5py.opaque_dtype(np.dtype("M8[s]")),
)  # fmt: skip
NAMES = (b"x", b"\xff\xfe", b"\x1b[2J", b"[/red]", "é".encode(), b"n" * 5000, b".", b"a b")
ATTRIBUTES: tuple[Any, ...] = (
    "x", 5, -1, 2, 1.0, float("nan"), True, np.int8(1), np.uint64(2**64 - 1), np.zeros(10), h5py.Empty("f4"),
    b"\xff\xfe", np.bytes_(b"moempi results"), np.bytes_(b"moempi weights"), "moempi results", "x" * 60_000,
    np.zeros((2, 2), "S3"), np.array(["a"], object),
)  # fmt: skip
HEADER = b"OHDR\x02"


def dataset_names(path: Path) -> list[str]:
    """The names of all datasets of a file."""
    names: list[str] = []
    with h5py.File(path) as file:
        file.visititems(lambda name, found: names.append(name) if isinstance(found, h5py.Dataset) else None)
    return names


def damage_objects(random: Random, path: Path, names: Sequence[str]) -> None:
    """Change one to three objects of a file that has datasets of these names."""
    with h5py.File(path, "r+") as file:
        for _ in range(random.choice((1, 1, 2, 3))):
            name = random.choice(names)
            with suppress(Exception):  # not every change is possible
                random.choice(CHANGES)(random, file, name)


def change_values(random: Random, file: Any, name: str) -> None:
    """Replace one number, a run of numbers, or all."""
    values = file[name][...]
    flat = values.reshape(-1)
    odd = values.dtype.kind in "iuf" and not file[name].id.get_type().equal(h5t.py_create(values.dtype))
    if odd or values.dtype.hasobject or not flat.size:  # h5py can crash when it writes these
        return
    first = random.randrange(flat.size)
    last = random.choice((first + 1, first + 1, first + 1, flat.size))
    match values.dtype.kind:
        case "i" | "u":
            near = (int(flat[first]) + 1, int(flat[first]) - 1)
            number = random.choice((*near, *near, *INTEGERS)) & (1 << 8 * values.dtype.itemsize) - 1
            flat[first:last] = np.array(number, f"<u{values.dtype.itemsize}").view(values.dtype)
        case "f":
            with np.errstate(all="ignore"):
                flat[first:last] = random.choice(FLOATS)
        case _:
            flat[first:last] = random.choice(TEXTS)
    file[name][...] = values


def change_type(random: Random, file: Any, name: str) -> None:
    shape = file[name].shape
    del file[name]
    file.create_dataset(name, data=np.zeros(shape, random.choice(TYPES)))


def declare_odd_type(random: Random, file: Any, name: str) -> None:
    """Numbers of a size or with bits that NumPy does not have."""
    shape = file[name].shape
    del file[name]
    kind = random.choice((h5t.STD_I32LE, h5t.STD_U64BE, h5t.IEEE_F32LE)).copy()
    if random.random() < 0.5:
        kind.set_size(random.choice((1, 3, 5, 7, 9, 16)))
    else:
        kind.set_precision(random.choice((1, 7, 12, 24, 31)))
    owner, _, last = name.rpartition("/")
    h5d.create(file[owner or "/"].id, last.encode(), kind, h5s.create_simple(shape), _early())


def _early() -> Any:
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    return creation


def change_shape(random: Random, file: Any, name: str) -> None:
    values = file[name][...]
    del file[name]
    sizes = tuple(random.choice((size, size + 1, max(0, size - 1), 2 * size, 0)) for size in values.shape)
    shape = random.choice((sizes, sizes, (), (*values.shape, 1), (1, *values.shape), values.shape[::-1]))
    if random.random() < 0.1:
        file[name] = h5py.Empty(values.dtype)
    else:
        file[name] = np.resize(values, shape)


def declare(random: Random, file: Any, name: str) -> None:
    """A dataset of any size without storage."""
    kind = file[name].dtype
    del file[name]
    shape = random.choice(((2**40,), (2**62,), (2**31, 2**31), (5,), (0, 2**40)))
    file.create_dataset(name, shape=shape, dtype=kind, chunks=random.choice((None, tuple(1 for _ in shape))))


def change_storage(random: Random, file: Any, name: str) -> None:
    """The same values in chunks, through filters, compact, external or virtual."""
    values = file[name][...]
    del file[name]
    match random.randrange(5):
        case 0:
            file.create_dataset(name, data=values, chunks=True)
        case 1:
            file.create_dataset(name, data=values, chunks=True, compression="gzip", fletcher32=True)
        case 2:
            creation = h5p.create(h5p.DATASET_CREATE)
            creation.set_layout(h5d.COMPACT)
            owner, _, last = name.rpartition("/")
            kind = h5t.py_create(values.dtype)
            h5d.create(file[owner or "/"].id, last.encode(), kind, h5s.create_simple(values.shape), creation)
        case 3:
            file.create_dataset(
                name, shape=values.shape, dtype=values.dtype, external=[("/etc/passwd", 0, values.nbytes)]
            )
        case _:
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[...] = h5py.VirtualSource("../seeds/results.h5", "request", values.shape)
            file.create_virtual_dataset(name, layout)


def change_link(random: Random, file: Any, name: str) -> None:
    """Another kind of link, or another object behind it."""
    other = random.choice((name, "/", "nowhere", "requests", "tensors", *list(file)))
    target = file[random.choice(list(file))]
    link = random.choice(
        (
            h5py.SoftLink(f"/{other}"),
            h5py.ExternalLink("../seeds/results.h5", "/request"),
            file["/"],
            target,
            np.dtype("f4"),
        )
    )
    place = random.choice((name, name, f"{name}x", "x", name.rpartition("/")[0] or name))
    if place in file:
        del file[place]
    file[place] = link


def remove(random: Random, file: Any, name: str) -> None:
    del file[random.choice((name, name, name.rpartition("/")[0] or name))]


def put_group(_: Random, file: Any, name: str) -> None:
    del file[name]
    file.create_group(name)


def add_object(random: Random, file: Any, name: str) -> None:
    """An object with a strange name, or groups of great depth."""
    if random.random() < 0.2:
        file.create_group("/".join("d" * random.choice((10, 15, 16, 40))))
        return
    owner = file[name.rpartition("/")[0] or "/"].id
    added = random.choice(NAMES)
    if random.random() < 0.5:
        h5g.create(owner, added)
    else:
        h5d.create(owner, added, h5t.STD_I32LE, h5s.create_simple((3,)))


def move(random: Random, file: Any, name: str) -> None:
    file.move(name, random.choice((f"{name}_", "moved", f"a/b/{name}")))


def change_attribute(random: Random, file: Any, name: str) -> None:
    owner = file[random.choice((name, "/", "/", "/"))]
    key = random.choice((*owner.attrs, "format", "version", "units", "x"))
    if key in owner.attrs and random.random() < 0.2:
        del owner.attrs[key]
        return
    owner.attrs[key] = random.choice((*ATTRIBUTES, file.ref))


CHANGES: tuple[Callable[[Random, Any, str], None], ...] = (
    change_values, change_values, change_values, change_values, change_values, change_type, declare_odd_type,
    change_shape, declare,
    change_storage, change_link, remove, put_group, add_object, move, change_attribute, change_attribute,
)  # fmt: skip


def damage_bytes(random: Random, content: bytes) -> bytes:
    """Damage of the whole file, or inside one header whose checksum is renewed."""
    starts = [at for at in range(len(content)) if content.startswith(HEADER, at)] if random.random() < 0.6 else []
    if not starts:
        return damaged(random, content)
    start = random.choice(starts)
    end = _end_of_header(content, start)
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 3))):
        at = random.randrange(start + len(HEADER) + 2, max(end, start + len(HEADER) + 3))
        if random.random() < 0.3:
            width = random.choice((1, 2, 4, 8))
            number = random.choice(INTEGERS) & (1 << 8 * width) - 1
            changed[at : at + width] = number.to_bytes(width, "little")
        else:
            changed[at] ^= 1 << random.randrange(8)
    changed[end : end + 4] = struct.pack("<I", lookup3(bytes(changed[start:end])))
    return bytes(changed[: len(content)])


def _end_of_header(content: bytes, start: int) -> int:
    """Where the checksum of an object header (version 2) begins: after flags, times, limits, size and messages."""
    flags = content[start + 5]
    at = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    return at + width + int.from_bytes(content[at : at + width], "little")


def lookup3(content: bytes) -> int:
    """Bob Jenkins's hash lookup3 (2006) with initial value 0, the checksum of HDF5's metadata."""
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(content)) & mask
    padded = content + b"\0" * (-len(content) % 12)
    words = struct.unpack(f"<{len(padded) // 4}I", padded)
    for at in range(0, len(words) - 3, 3):
        a, b, c = (a + words[at]) & mask, (b + words[at + 1]) & mask, (c + words[at + 2]) & mask
        for shift in (4, 6, 8, 16, 19, 4):
            a = (a - c & mask) ^ (c << shift & mask | c >> 32 - shift)
            c = c + b & mask
            a, b, c = b, c, a
    if not content:
        return c
    a, b, c = ((one + word) & mask for one, word in zip((a, b, c), words[-3:], strict=True))
    for shift in (14, 11, 25, 16, 4, 14, 24):
        c = (c ^ b) - (b << shift & mask | b >> 32 - shift) & mask
        a, b, c = b, c, a
    return b
