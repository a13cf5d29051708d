import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from moempi.config.architecture import Architecture
from moempi.config.tensors import catalogue
from moempi.errors import DataError, NoInputError
from moempi.storage.weights import WeightFile, write_weights
from storage.models import SMALL, origin_values, pieces, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.h5"
    write_model(path)
    return path


@pytest.fixture
def damage(model, tmp_path):
    """Change a copy of the model with plain h5py, then open it."""

    def change_and_open(change, **options):
        path = tmp_path / "changed.h5"
        path.write_bytes(model.read_bytes())
        with h5py.File(path, "r+") as file:
            change(file)
        return WeightFile.open(path, **options)

    return change_and_open


def test_a_model_is_read_as_written(model):
    with WeightFile.open(model) as weights:
        assert weights.architecture == SMALL
        assert weights.tokenizer == '{"é": 1}'
        assert weights.path == model
        for tensor in catalogue(SMALL):
            read = weights.read(tensor.name)
            np.testing.assert_array_equal(read, origin_values(tensor), err_msg=tensor.name)
            assert (read.dtype, read.ctypes.data % 64) == (np.uint16, 0)
            assert weights.tensor(tensor.name) == tensor


@settings(max_examples=60)
@given(index=st.integers(0, len(catalogue(SMALL)) - 1), ends=st.tuples(st.integers(0, 150), st.integers(0, 150)))
def test_any_range_of_rows(model, index, ends):
    tensor = catalogue(SMALL)[index]
    start, stop = sorted(min(end, tensor.shape[0]) for end in ends)
    with WeightFile.open(model) as weights:
        read = weights.read(tensor.name, start, stop)
    np.testing.assert_array_equal(read, origin_values(tensor)[start:stop])
    assert not read.size or read.ctypes.data % 64 == 0


@pytest.mark.parametrize("rows", [(-1, 2), (2, 1), (0, 151)])
def test_rows_outside_are_an_index_error(model, rows):
    with WeightFile.open(model) as weights, pytest.raises(IndexError, match="embedding has rows 0 to 150"):
        weights.read("embedding", *rows)


def test_the_file_does_not_depend_on_the_pieces_or_the_time(model, tmp_path):
    for step in (1, 64, 1000):
        write_model(tmp_path / "again.h5", step=step)
        assert (tmp_path / "again.h5").read_bytes() == model.read_bytes()


def test_different_models_have_different_fingerprints(tmp_path):
    prints = {
        write_model(tmp_path / "a.h5"),
        write_model(tmp_path / "b.h5", tokenizer=""),
        write_model(tmp_path / "c.h5", msgspec.structs.replace(SMALL, max_positions=33)),
    }
    with WeightFile.open(tmp_path / "b.h5") as weights:
        assert weights.fingerprint in prints
    assert len(prints) == 3


def test_checksums_are_xxh3_of_blocks_as_documented(model):
    with h5py.File(model) as file:
        checksums = file["checksums"][:]
        for entry in msgspec.json.decode(file["catalogue"][:].tobytes()):
            bits = origin_values(next(t for t in catalogue(SMALL) if t.name == entry["name"]))
            for block in range(-(-entry["shape"][0] // entry["block_rows"])):
                rows = bits[block * entry["block_rows"] : (block + 1) * entry["block_rows"]]
                assert xxhash.xxh3_64_intdigest(rows.tobytes()) == checksums[entry["first_block"] + block]


def test_a_damaged_row_is_named_and_other_blocks_can_be_read(model, tmp_path):
    path = tmp_path / "damaged.h5"
    path.write_bytes(model.read_bytes())
    with h5py.File(path) as file:
        offset = file["tensors/layers/001/experts/down"].id.get_offset()
    with path.open("r+b") as file:
        file.seek(offset + 1 * 8 * 6 * 2 + 5)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    with WeightFile.open(path) as weights:
        assert len(weights.read("layers/001/experts/down", 2, 3)) == 1
        assert len(weights.read("layers/001/experts/up")) == 3
        with pytest.raises(DataError, match=r"damaged\.h5: layers/001/experts/down: rows 1 to 2 are damaged"):
            weights.read("layers/001/experts/down")


def test_a_range_is_verified_beyond_its_own_rows(model, tmp_path):
    path = tmp_path / "damaged.h5"
    path.write_bytes(model.read_bytes())
    with h5py.File(path, "r+") as file:
        file["tensors/embedding"][130, 0] = 5.0
    with WeightFile.open(path) as weights:
        assert len(weights.read("embedding", 0, 128)) == 128
        with pytest.raises(DataError, match="embedding: rows 128 to 150"):
            weights.read("embedding", 140, 141)


def test_missing_file_is_no_input(tmp_path):
    with pytest.raises(NoInputError, match=r"nowhere\.h5"):
        WeightFile.open(tmp_path / "nowhere.h5")


def test_another_hdf5_file_is_refused(tmp_path):
    h5py.File(tmp_path / "other.h5", "w").close()
    with pytest.raises(DataError, match="is not a moempi weight file"):
        WeightFile.open(tmp_path / "other.h5")


def set_attribute(name, value):
    def change(file):
        file.attrs.modify(name, value)

    return change


def set_text(name, text):
    def change(file):
        del file[name]
        file.create_dataset(name, data=np.frombuffer(text, np.uint8))

    return change


def remove(name):
    def change(file):
        del file[name]

    return change


def replace_dataset(name, values):
    def change(file):
        file.pop(name, None)
        file[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_attribute("version", 2), "has format version 2, this program reads 1"),
        (set_attribute("fingerprint", np.bytes_(b"0" * 32)), "fingerprint differs"),
        (set_text("tokenizer", b"{}"), "fingerprint differs"),
        (lambda file: file["checksums"].write_direct(np.zeros(len(file["checksums"]), np.uint64)), "fingerprint"),
        (remove("catalogue"), "catalogue: is missing"),
        (remove("tensors/layers/001/router"), "tensors/layers/001/router: is missing"),
        (remove("tensors"), "is missing"),
        (replace_dataset("tensors/norm", np.ones(9, np.float32)), "tensors/norm: its type is not bfloat16"),
        (replace_dataset("tensors/layers/002/bias", np.ones(9)), "layers/002/bias: does not belong"),
        (lambda file: file.create_group("tensors/layers/000/dense/gate2"), "gate2: does not belong"),
    ],
)
def test_inconsistent_contents_are_refused(damage, change, message):
    with pytest.raises(DataError, match=message):
        damage(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("tensors/norm"), "tensors/norm: is missing"),
        (replace_dataset("tensors/norm", np.ones(9, np.float32)), "tensors/norm: its type is not bfloat16"),
        (replace_dataset("tensors/norm", h5py.SoftLink("/tensors/embedding")), "soft and external links are refused"),
        (replace_dataset("tensors/norm", h5py.ExternalLink("x.h5", "norm")), "soft and external links are refused"),
    ],
)
def test_a_file_that_is_not_opened_whole_verifies_what_is_needed_of_it(damage, change, message):
    with damage(change, whole=False) as weights:
        for need in (weights.read, lambda name: weights.byte_range(name, 0, 1)):
            with pytest.raises(DataError, match=message):
                need("norm")
        np.testing.assert_array_equal(weights.read("embedding"), origin_values(weights.tensor("embedding")))
    with pytest.raises(DataError, match="norm"):
        damage(change)


@pytest.mark.parametrize("after", ["removed", "replaced by a smaller file"])
def test_a_file_that_is_not_opened_whole_is_the_one_that_was_opened(model, tmp_path, after):
    """As for a rank that loads its tensors long after the opening."""
    path = Path(shutil.copy(model, tmp_path / "weights.h5"))
    with WeightFile.open(path, whole=False) as weights:
        path.unlink()
        if after != "removed":
            path.write_bytes(b"other")
        np.testing.assert_array_equal(weights.read("norm"), origin_values(weights.tensor("norm")))


def test_the_texts_of_a_file_are_verified_by_who_does_not_open_it_whole(damage):
    with pytest.raises(DataError, match="fingerprint differs"):
        damage(set_text("tokenizer", b"{}"), whole=False)


def rewrite(architecture=SMALL, catalogue_of=SMALL):
    """Write texts that contradict the tensors, with a valid fingerprint of the texts."""
    from moempi.storage import weights

    texts = {
        "architecture": architecture if isinstance(architecture, bytes) else msgspec.json.encode(architecture),
        "catalogue": catalogue_of
        if isinstance(catalogue_of, bytes)
        else weights._encode_catalogue(catalogue(catalogue_of)),
        "tokenizer": b"",
    }

    def change(file):
        for name, text in texts.items():
            set_text(name, text)(file)
        print_of = weights._fingerprint(texts | {"checksums": file["checksums"][:].tobytes()})
        file.attrs.modify("fingerprint", np.bytes_(print_of.encode()))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rewrite(b'{"family": 1}'), "architecture: "),
        (rewrite(b"[" * 100_000), "architecture: "),
        (rewrite(msgspec.structs.replace(SMALL, num_layers=2)), "catalogue: does not list"),
        (rewrite(msgspec.structs.replace(SMALL, num_layers=1000)), "catalogue: has fewer tensors than"),
        (rewrite(msgspec.structs.replace(SMALL, dense_width=0)), "architecture: dense_width is 0"),
        (rewrite(catalogue_of=b"{}"), "catalogue: "),
        (rewrite(*2 * [msgspec.structs.replace(SMALL, vocab_size=2**31 - 1)]), "checksums: there are"),
        (rewrite(*2 * [msgspec.structs.replace(SMALL, vocab_size=151)]), r"embedding: its shape is \(150, 8\), not"),
    ],
)
def test_texts_that_do_not_match_the_tensors_are_refused(damage, change, message):
    with pytest.raises(DataError, match=message):
        damage(change)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "shorter"),
        ([(t, pieces(t, 8)) for t in reversed(catalogue(SMALL))], "was given where embedding is due"),
        ([(t, pieces(t, 8)[:-1]) for t in catalogue(SMALL)], "embedding has 150 rows, 144 were given"),
    ],
)
def test_writing_other_tensors_raises_and_leaves_no_file(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=message):
        write_weights(tmp_path / "model.h5", SMALL, tokenizer="", tensors=tensors)
    assert not list(tmp_path.iterdir())


def test_an_architecture_is_read_as_written(tmp_path):
    other = msgspec.structs.replace(SMALL, tied_embeddings=True, dense_layers=(), bos_token=0, eos_tokens=(1, 2))
    write_model(tmp_path / "model.h5", other)
    with WeightFile.open(tmp_path / "model.h5") as weights:
        assert isinstance(weights.architecture, Architecture)
        assert weights.architecture == other
        with pytest.raises(KeyError):
            weights.read("head")


FULL_DISK = """
import resource, sys
from moempi.errors import StorageError
from storage.models import write_model
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    write_model(sys.argv[1])
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("limit_bytes", [0, 100, 3_000, 20_000, 30_000])
def test_a_full_disk_is_one_clear_error(tmp_path, limit_bytes):
    path = tmp_path / "w.h5"
    run = [sys.executable, "-c", FULL_DISK, str(path), str(limit_bytes)]
    ended = subprocess.run(run, env={"PYTHONPATH": "tests"}, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"{path}: cannot be written")
    assert not list(tmp_path.iterdir())
