import os
import shutil
import subprocess

import h5py
import numpy as np
import pytest
from h5py import h5t

from moempi.errors import DataError, NoInputError, StorageError
from moempi.storage import hdf5
from moempi.storage.files import atomic, reserve
from mpirun import execute, python


def numbers(dtype, shape):
    return np.arange(np.prod(shape)).astype(hdf5.MEMORY_TYPES[dtype]).reshape(shape)


def write_one(path, *, dtype="bfloat16", shape=(10, 3), name="group/rows"):
    with h5py.File(path, "w", libver=hdf5.WRITE_VERSION) as file:
        dataset = hdf5.create_dataset(file, name, dtype=dtype, shape=shape)
        hdf5.write_rows(dataset, 0, numbers(dtype, shape), dtype=dtype)


@pytest.mark.parametrize("dtype", sorted(hdf5.FILE_TYPES))
@pytest.mark.parametrize("rows", [(0, 10), (3, 7), (9, 10), (4, 4)])
def test_rows_are_read_as_written(tmp_path, dtype, rows):
    write_one(tmp_path / "file.h5", dtype=dtype)
    with hdf5.open_file(tmp_path / "file.h5") as file:
        dataset = hdf5.checked_dataset(file, "group/rows", dtype=dtype, shape=(10, 3))
        read = hdf5.read_rows(dataset, *rows, dtype=dtype)
    np.testing.assert_array_equal(read, numbers(dtype, (10, 3))[slice(*rows)])
    assert read.dtype == hdf5.MEMORY_TYPES[dtype]
    assert not read.size or read.ctypes.data % 64 == 0


def test_rows_written_in_pieces(tmp_path):
    with h5py.File(tmp_path / "file.h5", "w", libver=hdf5.WRITE_VERSION) as file:
        dataset = hdf5.create_dataset(file, "rows", dtype="uint64", shape=(5, 2))
        hdf5.write_rows(dataset, 3, numbers("uint64", (5, 2))[3:], dtype="uint64")
        hdf5.write_rows(dataset, 0, numbers("uint64", (5, 2))[:3], dtype="uint64")
        np.testing.assert_array_equal(file["rows"][:], numbers("uint64", (5, 2)))


def test_bfloat16_reads_as_a_number_in_plain_h5py(tmp_path):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        dataset = hdf5.create_dataset(file, "rows", dtype="bfloat16", shape=(4,))
        hdf5.write_rows(dataset, 0, np.array([0x3F80, 0xC040, 0x0000, 0x4049], np.uint16), dtype="bfloat16")
    with h5py.File(tmp_path / "file.h5") as file:
        assert file["rows"].dtype == np.float32
        assert file["rows"][:].tolist() == [1.0, -3.0, 0.0, 3.140625]


def test_writing_the_wrong_type_raises(tmp_path):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        dataset = hdf5.create_dataset(file, "rows", dtype="bfloat16", shape=(4,))
        with pytest.raises(ValueError, match="cannot be rows"):
            hdf5.write_rows(dataset, 0, np.ones(4, np.float32), dtype="bfloat16")


def test_a_missing_file_a_folder_and_a_pipe_are_input_errors(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "nowhere.h5", tmp_path, tmp_path / "pipe"):
        with pytest.raises(NoInputError, match=str(path)):
            hdf5.open_file(path)


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all", b"\x89HDF\r\n\x1a\n" + bytes(100)])
def test_files_of_another_format_are_refused(tmp_path, content):
    (tmp_path / "file.h5").write_bytes(content)
    with pytest.raises(DataError, match=r"file\.h5"):
        hdf5.open_file(tmp_path / "file.h5")


@pytest.mark.parametrize(("dtype", "shape"), [("bfloat16", (10, 4)), ("bfloat16", (30,)), ("float32", (10, 3))])
def test_other_type_or_shape_is_refused(tmp_path, dtype, shape):
    write_one(tmp_path / "file.h5")
    with hdf5.open_file(tmp_path / "file.h5") as file, pytest.raises(DataError, match=r"file\.h5: group/rows: its"):
        hdf5.checked_dataset(file, "group/rows", dtype=dtype, shape=shape)


@pytest.mark.parametrize("kind", [h5t.IEEE_F16LE, h5t.STD_U16LE, h5t.IEEE_F32BE])
def test_types_of_the_same_size_are_distinguished(tmp_path, kind):
    expected = "bfloat16" if kind.get_size() == 2 else "float32"
    with h5py.File(tmp_path / "file.h5", "w") as file:
        h5py.h5d.create(file.id, b"rows", kind, h5py.h5s.create_simple((4,)))
        file["rows"][:] = 1
    with hdf5.open_file(tmp_path / "file.h5") as file, pytest.raises(DataError, match=f"its type is not {expected}"):
        hdf5.checked_dataset(file, "rows", dtype=expected, shape=(4,))


@pytest.mark.parametrize("value", ["", "héllo", 0, -(2**40)])
def test_attributes_are_read_as_written(tmp_path, value):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        hdf5.write_attribute(file, "note", value)
        dataset = hdf5.create_dataset(file, "rows", dtype="uint8", shape=(1,))
        hdf5.write_attribute(file, "units", value, owner=dataset)
    with hdf5.open_file(tmp_path / "file.h5") as file:
        assert hdf5.read_attribute(file, "note") == value
        assert hdf5.read_attribute(file, "units", owner=file["rows"].id) == value
        assert hdf5.read_attribute(file, "absent") is None
        assert file.attrs["note"] in (value, str(value).encode())


@pytest.mark.parametrize("value", ["variable length", np.arange(3), np.bytes_(b"\xff")])
def test_unbounded_attributes_are_refused(tmp_path, value):
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.attrs["note"] = value
    with hdf5.open_file(tmp_path / "file.h5") as file, pytest.raises(DataError, match=r"note|UTF-8"):
        hdf5.read_attribute(file, "note")


def test_vectors_are_bounded(tmp_path):
    write_one(tmp_path / "file.h5", dtype="uint8", shape=(100,), name="text")
    with hdf5.open_file(tmp_path / "file.h5") as file:
        assert len(hdf5.read_vector(file, "text", dtype="uint8", limit=100)) == 100
        with pytest.raises(DataError, match="at most 99"):
            hdf5.read_vector(file, "text", dtype="uint8", limit=99)
        with pytest.raises(DataError, match="type is not uint64"):
            hdf5.read_vector(file, "text", dtype="uint64", limit=100)


def test_walk_lists_every_object(tmp_path):
    write_one(tmp_path / "file.h5", name="a/b/rows")
    with hdf5.open_file(tmp_path / "file.h5") as file:
        assert list(hdf5.walk(file)) == [("a", True), ("a/b", True), ("a/b/rows", False)]


def test_atomic_replaces_at_the_end_and_keeps_permissions_of_a_new_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert (tmp_path / "file").read_text() == "old"
    (tmp_path / "other").touch()
    assert (tmp_path / "file").read_text() == "new"
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


@pytest.mark.parametrize(
    ("raised", "seen"), [(DataError("bad"), DataError), (OSError(28, "No space left"), StorageError),
                         (KeyboardInterrupt(), KeyboardInterrupt)]
)  # fmt: skip
def test_atomic_leaves_no_temporary_file(tmp_path, raised, seen):
    (tmp_path / "file").write_text("old")

    def write():
        with atomic(tmp_path / "file") as temporary:
            temporary.write_text("half")
            raise raised

    with pytest.raises(seen):
        write()
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("path", ["folder", "nowhere/file"])
def test_atomic_refuses_a_target_that_it_cannot_replace(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=path), atomic(tmp_path / path):
        pytest.fail("the block must not run")


def test_reserve_allocates_blocks(tmp_path):
    (tmp_path / "file").write_bytes(b"kept")
    reserve(tmp_path / "file", 100_000)
    assert (tmp_path / "file").stat().st_blocks * 512 >= 100_000
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_reserve_refuses_more_than_the_free_space(tmp_path):
    # Larger than any possible file: without the check ahead, the system would refuse it and allocate no block.
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="No space left on device, 9,223,372,036,854,771,712 bytes are needed"):
        reserve(tmp_path / "file", 2**63 - 4096)
    assert (tmp_path / "file").stat().st_blocks == 0


def test_atomic_frees_unused_reserved_blocks(tmp_path):
    with atomic(tmp_path / "file") as temporary:
        temporary.write_bytes(b"kept")
        reserve(temporary, 10_000_000)
    assert (tmp_path / "file").read_bytes() == b"kept"
    assert (tmp_path / "file").stat().st_blocks * 512 < 1_000_000


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_a_lock_that_hdf5_is_refused_is_no_damage(tmp_path):
    """HDF5_USE_FILE_LOCKING=TRUE makes HDF5 lock what it was asked not to lock, also where there are no locks."""
    h5py.File(tmp_path / "a.h5", "w").close()
    (tmp_path / "no_locks.c").write_text("#include <errno.h>\nint flock(int f, int o) { errno = ENOLCK; return -1; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "no_locks.so", tmp_path / "no_locks.c"], check=True)
    environment = {"LD_PRELOAD": str(tmp_path / "no_locks.so"), "HDF5_USE_FILE_LOCKING": "TRUE"}
    outcome = execute(*python("-m", "moempi", "inspect", tmp_path / "a.h5"), **environment)
    assert outcome.code == 66
    assert "HDF5 gets no lock on it; unset HDF5_USE_FILE_LOCKING" in outcome.lines[0]
    assert (
        execute(*python("-m", "moempi", "inspect", tmp_path / "a.h5"), LD_PRELOAD=environment["LD_PRELOAD"]).code == 0
    )
