import msgspec
import numpy as np
import pytest
import xxhash

from moempi.config.tensors import catalogue
from moempi.errors import StorageError
from moempi.storage.initialize import initialize
from moempi.storage.weights import WeightFile
from storage.models import SMALL

WIDE = msgspec.structs.replace(SMALL, width=256, vocab_size=300, dense_width=128)


def values(weights, name):
    return (weights.read(name).astype(np.uint32) << 16).view(np.float32)


def test_the_same_seed_gives_the_same_file(tmp_path):
    first = initialize(SMALL, tmp_path / "a.h5", seed=3)
    assert initialize(SMALL, tmp_path / "b.h5", seed=3) == first
    assert initialize(SMALL, tmp_path / "c.h5", seed=4) != first
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_the_values_of_a_seed_never_change(tmp_path):
    initialize(SMALL, tmp_path / "model.h5", seed=3)
    with WeightFile.open(tmp_path / "model.h5") as weights:
        digests = [xxhash.xxh3_64_hexdigest(weights.read(tensor.name).tobytes()) for tensor in catalogue(SMALL)]
    assert xxhash.xxh3_64_hexdigest("".join(digests).encode()) == "425547818c6fe7ea"


def test_scale_follows_the_number_of_inputs(tmp_path):
    initialize(WIDE, tmp_path / "model.h5", seed=1)
    inputs = {"embedding": 256, "layers/001/attention/q": 256, "layers/001/attention/o": 16}
    inputs |= {"layers/000/dense/down": 128, "layers/002/experts/down": 6, "layers/002/experts/up": 256}
    with WeightFile.open(tmp_path / "model.h5") as weights:
        assert weights.tokenizer == ""
        for name, count in inputs.items():
            matrix = values(weights, name)
            assert abs(matrix.std() * count**0.5 - 1) < 0.05, name
            assert abs(matrix.mean()) < 5 * matrix.std() / matrix.size**0.5, name
        assert abs(values(weights, "norm").mean() - 1) < 0.05


def test_all_blocks_differ(tmp_path):
    initialize(SMALL, tmp_path / "model.h5", seed=1)
    with WeightFile.open(tmp_path / "model.h5") as weights:
        blocks = [
            weights.read(tensor.name, start, min(start + tensor.block_rows, tensor.shape[0])).tobytes()
            for tensor in catalogue(SMALL)
            for start in range(0, tensor.shape[0], tensor.block_rows)
        ]
    assert len({block[:8] for block in blocks}) == len(blocks)


def test_weights_that_no_disk_holds_are_refused(tmp_path):
    with pytest.raises(StorageError, match="are needed"):
        initialize(msgspec.structs.replace(SMALL, vocab_size=2**31 - 1, width=2**31 - 1), tmp_path / "m.h5", seed=1)
    assert not list(tmp_path.iterdir())
