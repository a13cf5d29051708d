"""Hostile files and files with one flipped bit are refused, and nothing outside the file is read."""

import os

import h5py
import msgspec
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t

from moempi.config.architecture import Architecture, AttentionShape, Experts, Router
from moempi.config.tensors import catalogue
from moempi.errors import DataError, MoempiError
from moempi.storage import hdf5
from moempi.storage.convert import convert
from moempi.storage.inspect import inspect
from moempi.storage.weights import WeightFile
from storage.checkpoints import write_checkpoint
from storage.models import SMALL, write_model

NUM_FLIPS = 1000
TINY = Architecture(
    family="qwen3_moe",
    vocab_size=10,
    width=4,
    num_layers=2,
    max_positions=8,
    attention=AttentionShape(num_heads=1, num_kv_heads=1, head_dim=4),
    experts=Experts(num=2, width=3, router=Router(top_k=1)),
    dense_layers=(0,),
    dense_width=5,
)
ROW_BYTES, ROWS = SMALL.width * 2, SMALL.vocab_size


def contents(path):
    with WeightFile.open(path) as weights:
        tensors = [weights.read(tensor.name).tobytes() for tensor in catalogue(weights.architecture)]
        return weights.architecture, weights.tokenizer, weights.fingerprint, tensors


def flipped_copies(path, copy, *, count, first=0, last=None):
    """Yield `copy` holding `path` with one bit flipped, `count` times, bytes [first, last)."""
    original = path.read_bytes()
    random = np.random.default_rng(11)
    last = len(original) if last is None else last
    for bit in random.choice((last - first) * 8, size=count, replace=(last - first) * 8 < count):
        changed = bytearray(original)
        changed[first + bit // 8] ^= 1 << (bit % 8)
        copy.write_bytes(changed)
        yield copy


def test_a_flipped_bit_never_gives_other_weights(tmp_path):
    write_model(tmp_path / "model.h5", TINY)
    expected = contents(tmp_path / "model.h5")
    messages = []
    for path in flipped_copies(tmp_path / "model.h5", tmp_path / "flipped.h5", count=NUM_FLIPS):
        try:
            assert contents(path) == expected
        except MoempiError as error:
            messages.append(str(error))
    assert len(messages) > NUM_FLIPS // 2
    assert all("flipped.h5" in message for message in messages)


def test_a_file_truncated_anywhere_is_refused(tmp_path):
    write_model(tmp_path / "model.h5", TINY)
    whole = (tmp_path / "model.h5").read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "cut.h5").write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.h5"):
            contents(tmp_path / "cut.h5")


def test_flipped_bits_in_a_checkpoint_raise_only_our_errors(tmp_path):
    write_checkpoint(tmp_path / "hub")
    length = int.from_bytes((tmp_path / "hub/model.safetensors").read_bytes()[:8], "little")
    messages = []
    for name, last in {"model.safetensors": 8 + length, "config.json": None, "tokenizer.json": None}.items():
        path = tmp_path / "hub" / name
        original = path.read_bytes()
        for _ in flipped_copies(path, path, count=150, last=last):
            try:
                convert(tmp_path / "hub", tmp_path / "model.h5")
            except MoempiError as error:
                messages.append(str(error))
        path.write_bytes(original)
    assert len(messages) > 100
    assert all(str(tmp_path / "hub") in message for message in messages)
    assert {path.name for path in tmp_path.iterdir()} <= {"hub", "model.h5"}


@pytest.fixture
def secret(tmp_path):
    """A file outside that hostile files refer to, big enough for any dataset, with access time 1970."""
    path = tmp_path / "secret"
    with h5py.File(path, "w") as file:
        file["rows"] = np.zeros((ROWS, SMALL.width), np.float32)
        file["group/rows"] = np.zeros(5)
    os.utime(path, (0, path.stat().st_mtime))
    return path


def create(file, name, kind, shape, creation=None):
    if name in file:
        del file[name]
    parent = file[name.rpartition("/")[0] or "/"]
    return h5d.create(parent.id, name.rpartition("/")[2].encode(), kind, h5s.create_simple(shape), creation)


def link_to(name, link):
    def change(file, secret):
        del file[name]
        file[name] = link(str(secret)) if callable(link) else link

    return change


def external_storage(file, secret):
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_external(str(secret).encode(), 0, ROWS * ROW_BYTES)
    create(file, "tensors/embedding", hdf5.FILE_TYPES["bfloat16"], (ROWS, SMALL.width), creation)


def virtual_dataset(file, secret):
    layout = h5py.VirtualLayout((ROWS, SMALL.width), np.float32)
    layout[:] = h5py.VirtualSource(str(secret), "rows", (ROWS, SMALL.width))
    del file["tensors/embedding"]
    file.create_virtual_dataset("tensors/embedding", layout)


def chunked(shape, **filters):
    def change(file, _):
        creation = h5p.create(h5p.DATASET_CREATE)
        creation.set_chunk((1, SMALL.width))
        if filters.get("gzip"):
            creation.set_deflate(9)
        create(file, "tensors/embedding", hdf5.FILE_TYPES["bfloat16"], shape, creation)

    return change


def compact(file, _):
    creation = h5p.create(h5p.DATASET_CREATE)
    creation.set_layout(h5d.COMPACT)
    create(file, "tensors/embedding", hdf5.FILE_TYPES["bfloat16"], (ROWS, SMALL.width), creation)


def of_type(kind):
    return lambda file, _: create(file, "tensors/norm", kind(), (SMALL.width,)) and None


def never_written(shape):
    return lambda file, _: create(file, "tensors/embedding", hdf5.FILE_TYPES["bfloat16"], shape) and None


def opaque():
    kind = h5t.create(h5t.OPAQUE, 2)
    kind.set_tag(b"bfloat16")
    return kind


def giant_texts(file, _):
    del file["tokenizer"]
    file.create_dataset("tokenizer", shape=(2**50,), chunks=(1024,), dtype=np.uint8)


def cycle(file, _):
    file["tensors/layers/000/attention/again"] = file["tensors"]


def named_type(file, _):
    file["tensors/type"] = np.dtype("f4")


def soft(target):
    return h5py.SoftLink(target)


HOSTILE = {
    "soft link": link_to("tensors/norm", soft("/tensors/layers/000/attention_norm")),
    "soft link to a group": link_to("tensors/layers/001", soft("/tensors/layers/002")),
    "soft link above everything": lambda file, _: file.move("tensors", "other") or link_to_new(file),
    "dangling link": link_to("tensors/norm", soft("/nowhere")),
    "external link": link_to("tensors/embedding", lambda secret: h5py.ExternalLink(secret, "rows")),
    "external link to a group": link_to("tensors/layers", lambda secret: h5py.ExternalLink(secret, "group")),
    "external link to a text": link_to("tokenizer", lambda secret: h5py.ExternalLink(secret, "rows")),
    "external storage": external_storage,
    "virtual dataset": virtual_dataset,
    "chunks": chunked((ROWS, SMALL.width)),
    "chunks of 4 PiB": chunked((2**48, SMALL.width)),
    "gzip": chunked((ROWS, SMALL.width), gzip=True),
    "compact": compact,
    "never written": never_written((ROWS, SMALL.width)),
    "4 PiB never written": never_written((2**48, SMALL.width)),
    "variable-length text": of_type(lambda: h5t.py_create(h5py.string_dtype(), logical=True)),
    "variable-length rows": of_type(lambda: h5t.vlen_create(h5t.STD_U16LE)),
    "opaque": of_type(opaque),
    "big endian": of_type(lambda: h5t.IEEE_F32BE),
    "references": of_type(lambda: h5t.STD_REF_OBJ),
    "giant text": giant_texts,
    "groups in a cycle": cycle,
    "named type": named_type,
}


def link_to_new(file):
    file["tensors"] = soft("/other")


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_weight_files_are_refused_and_read_nothing_outside(tmp_path, secret, change):
    write_model(tmp_path / "hostile.h5", tokenizer="")
    with h5py.File(tmp_path / "hostile.h5", "r+", libver=hdf5.WRITE_VERSION) as file:
        change(file, secret)
    os.utime(secret, (0, secret.stat().st_mtime))
    with pytest.raises(DataError, match=r"hostile\.h5"):
        WeightFile.open(tmp_path / "hostile.h5")
    assert secret.stat().st_atime == 0


@pytest.mark.parametrize("name", ["external storage", "virtual dataset", "external link"])
def test_plain_h5py_reads_outside_the_file(tmp_path, secret, name):
    write_model(tmp_path / "hostile.h5")
    with h5py.File(tmp_path / "hostile.h5", "r+", libver=hdf5.WRITE_VERSION) as file:
        HOSTILE[name](file, secret)
    os.utime(secret, (0, secret.stat().st_mtime))
    with h5py.File(tmp_path / "hostile.h5") as file:
        assert file["tensors/embedding"][:].shape == (ROWS, SMALL.width)
    if not secret.stat().st_atime:
        pytest.skip("this file system keeps no access times")


@pytest.mark.parametrize("name", ["soft link", "external link", "external link to a group", "groups in a cycle"])
def test_inspecting_follows_no_links(tmp_path, secret, name):
    write_model(tmp_path / "hostile.h5")
    with h5py.File(tmp_path / "hostile.h5", "r+", libver=hdf5.WRITE_VERSION) as file:
        HOSTILE[name](file, secret)
        del file.attrs["format"]
    os.utime(secret, (0, secret.stat().st_mtime))
    with pytest.raises(DataError, match=r"hostile\.h5: tensors/"):
        inspect(tmp_path / "hostile.h5")
    assert secret.stat().st_atime == 0


@pytest.mark.parametrize("name", ["external storage", "virtual dataset", "4 PiB never written", "variable-length rows"])
def test_inspecting_reads_no_rows(tmp_path, secret, name):
    write_model(tmp_path / "hostile.h5")
    with h5py.File(tmp_path / "hostile.h5", "r+", libver=hdf5.WRITE_VERSION) as file:
        HOSTILE[name](file, secret)
        del file.attrs["format"]
    os.utime(secret, (0, secret.stat().st_mtime))
    inspect(tmp_path / "hostile.h5")
    assert secret.stat().st_atime == 0


def test_a_sparse_file_cannot_declare_more_rows_than_checksums(tmp_path):
    big = msgspec.structs.replace(SMALL, vocab_size=2**31 - 1)
    write_model(tmp_path / "hostile.h5")
    with h5py.File(tmp_path / "hostile.h5", "r+", libver=hdf5.WRITE_VERSION) as file:
        for name in ("tensors/embedding", "tensors/head"):
            del file[name]
        del file["architecture"]
        file["architecture"] = np.frombuffer(msgspec.json.encode(big), np.uint8)
    os.truncate(tmp_path / "hostile.h5", 2**42)
    with pytest.raises(DataError, match="fingerprint differs"):
        WeightFile.open(tmp_path / "hostile.h5")
