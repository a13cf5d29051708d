"""A rank's share of a real weight file: sizes, remainders, experts, and the bytes that were read."""

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moempi.config.tensors import TENSOR_PARALLEL, Share, catalogue, layer_tensors
from moempi.engine.shard import Shard
from moempi.errors import DataError
from moempi.layout.row_split import part_range
from moempi.storage.weights import WeightFile
from storage.models import SMALL, origin_values, write_model

TENSORS = {tensor.name: tensor for tensor in catalogue(SMALL)}
DIVIDED = [name for name, tensor in TENSORS.items() if tensor.share in TENSOR_PARALLEL]
WHOLE = [name for name in TENSORS if name not in DIVIDED]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("shard") / "model.h5"
    write_model(path)
    return path


@pytest.fixture(scope="module")
def file(path):
    with WeightFile.open(path) as file:
        yield file


def test_the_model_of_these_tests_has_tensors_of_every_share():
    assert {tensor.share for tensor in TENSORS.values()} == {*Share}


@pytest.mark.parametrize("name", DIVIDED)
def test_the_parts_of_a_divided_tensor_are_its_rows_in_order(file, name):
    parts = [Shard(file, part=part, parts=2).read(name) for part in range(2)]
    assert [len(part) for part in parts] == [len(origin_values(TENSORS[name])) // 2] * 2
    np.testing.assert_array_equal(np.concatenate(parts), origin_values(TENSORS[name]))


@pytest.mark.parametrize("name", WHOLE)
def test_every_part_reads_all_other_tensors_whole(file, name):
    for part in range(2):
        np.testing.assert_array_equal(Shard(file, part=part, parts=2).read(name), origin_values(TENSORS[name]))


@given(parts=st.integers(1, 9), name=st.sampled_from(["embedding", "head"]))
def test_parts_of_the_vocabulary_are_cut_as_the_logits_are(file, parts, name):
    """150 rows: with a remainder for most numbers of parts."""
    rows = origin_values(TENSORS[name])
    for part in range(parts):
        read = Shard(file, part=part, parts=parts).read_vocabulary(name)
        np.testing.assert_array_equal(read, rows[part_range(len(rows), parts, part)])
        assert len(rows) // parts <= len(read) <= len(rows) // parts + 1


def test_the_vocabulary_may_be_cut_into_other_parts_than_the_heads(file):
    shard = Shard(file, part=1, parts=2, head=(2, 3))
    for name in ("embedding", "head"):
        rows = origin_values(TENSORS[name])
        np.testing.assert_array_equal(shard.read_vocabulary(name), rows[part_range(len(rows), 3, 2)])
    np.testing.assert_array_equal(shard.read("head"), shard.read_vocabulary("head"))
    name = "layers/001/attention/q"
    np.testing.assert_array_equal(shard.read(name), Shard(file, part=1, parts=2).read(name))


def test_more_parts_than_rows_leave_some_empty(file):
    parts = [Shard(file, part=part, parts=11).read_vocabulary("norm") for part in range(11)]
    assert sorted(map(len, parts)) == [0] * 3 + [1] * 8
    np.testing.assert_array_equal(np.concatenate(parts), origin_values(TENSORS["norm"]))


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_an_expert_is_one_whole_matrix_in_every_part(file, name, part):
    stack = f"layers/002/experts/{name}"
    shard = Shard(file, part=part, parts=2)
    for expert in range(SMALL.experts.num):
        matrix = shard.read_expert(stack, expert)
        np.testing.assert_array_equal(matrix, origin_values(TENSORS[stack])[expert])
    assert shard.num_bytes == TENSORS[stack].num_bytes


def test_an_expert_that_the_model_lacks_is_an_index_error(file):
    with pytest.raises(IndexError, match="has rows 0 to 3"):
        Shard(file, part=0, parts=1).read_expert("layers/001/experts/gate", 3)


def test_all_bytes_read_are_counted(file):
    shard = Shard(file, part=1, parts=4)
    assert shard.num_bytes == 0
    expected = 0
    for name, num_bytes in [
        ("layers/001/attention/q", 4 * 8 * 2),  # one head of four
        ("layers/001/attention_norm", 8 * 2),
        ("layers/001/attention_norm", 8 * 2),  # again
        ("head", (75 - 37) * 8 * 2),
    ]:
        shard.read(name)
        expected += num_bytes
        assert shard.num_bytes == expected
    shard.read_vocabulary("embedding")
    shard.read_expert("layers/001/experts/down", 2)
    assert shard.num_bytes == expected + 38 * 8 * 2 + 8 * 6 * 2


@pytest.mark.parametrize("parts", [1, 2])
def test_the_architecture_of_a_share_has_its_heads_and_is_the_same_otherwise(file, parts):
    architecture = Shard(file, part=parts - 1, parts=parts).architecture
    attention = architecture.attention
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (4 // parts, 2 // parts, 4)
    assert architecture.__replace__(attention=SMALL.attention) == SMALL
    assert file.architecture == SMALL


def test_only_part_0_is_the_first(file):
    assert [Shard(file, part=part, parts=3).is_first for part in range(3)] == [True, False, False]


def test_a_tensor_that_the_model_lacks(file):
    shard = Shard(file, part=0, parts=1)
    assert [shard.has(name) for name in ("head", "head_bias")] == [True, False]
    for read in (shard.read, shard.read_vocabulary):
        with pytest.raises(KeyError, match="head_bias"):
            read("head_bias")
    assert shard.num_bytes == 0


def test_damaged_rows_stop_the_part_that_reads_them_alone(path, tmp_path):
    name = "layers/001/attention/q"
    changed = tmp_path / "changed.h5"
    changed.write_bytes(path.read_bytes())
    with h5py.File(changed, "r+") as content:
        content[f"tensors/{name}"][-1, 0] = 5.0
    with WeightFile.open(changed) as file:
        first, last = (Shard(file, part=part, parts=2) for part in range(2))
        np.testing.assert_array_equal(first.read(name), origin_values(TENSORS[name])[:8])
        with pytest.raises(DataError, match=f"changed.h5: {name}: rows 12 to 16 are damaged"):
            last.read(name)
        assert last.num_bytes == 0


@pytest.mark.parametrize(("part", "parts", "layers"), [(0, 1, range(3)), (1, 2, range(1, 3)), (1, 3, range(2))])
def test_what_is_read_ahead_are_the_bytes_that_are_read_in_their_order(file, path, part, parts, layers):
    shard, contents = Shard(file, part=part, parts=parts), path.read_bytes()
    read = [shard.read(name).tobytes() for name in ("embedding",) if layers.start == 0]
    for layer in layers:
        names = [tensor.name for tensor in layer_tensors(SMALL, layer)]
        stacks = [name for name in names if "/experts/" in name]  # the last of a layer
        read += [shard.read(name).tobytes() for name in names if name not in stacks]
        read += [shard.read_expert(name, expert).tobytes() for expert in (2, 0) for name in stacks]
    read += [shard.read(name).tobytes() for name in ("norm", "head") if layers.stop == SMALL.num_layers]
    ranges = shard._byte_ranges(layers, dict.fromkeys(layers, (2, 0)))
    assert [contents[one.start : one.stop] for one in ranges] == read
