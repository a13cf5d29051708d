"""Results for Python, and their export as arrays: what the journals held, of each request alone."""

import struct
import tracemalloc

import h5py
import numpy as np
import pyarrow.parquet
import pytest
from safetensors import safe_open

from engine.runs import SMALL
from moempi import Results
from moempi.arrays import narrow, widen
from moempi.commands.export import ARRAYS
from moempi.errors import DataError
from moempi.storage import export_arrays
from moempi.storage.records import TraceRecord
from moempi.storage.replay_file import ReplayFile
from moempi.storage.results import Ragged
from moempi.storage.routing import RoutingFile
from storage.test_records import make_rank, make_request
from storage.test_results import merged

LENGTHS = (3, 1, 0)
"""Computed positions of the requests."""


def trace_of(table, columns, *, requests, positions, layers=(), step=0):
    return TraceRecord(
        table=table,
        since=0,
        step=step,
        rank=0,
        layers=layers,
        requests=np.array(requests, np.int64),
        positions=np.array(positions, np.int32),
        columns=columns,
    )


def states_of(layer, requests, positions):
    values = np.array(
        [[100 * r + 10 * p + layer + w / 4 for w in range(4)] for r, p in zip(requests, positions, strict=True)]
    )
    return values.astype(np.float32)


@pytest.fixture
def path(tmp_path):
    """Three requests: the second lacks the routing of its only position, the third failed at once."""
    requests, positions = [0, 1, 0, 0], [1, 0, 0, 2]
    states = np.stack([states_of(layer, requests, positions) for layer in (2, 5)])
    experts = np.arange(2 * 3 * 2, dtype=np.uint8).reshape(2, 3, 2)
    top = {"top_tokens": np.array([[7, 8]], np.int32), "top_logprobs": np.array([[-0.5, -1]], np.float16)}
    records = [
        trace_of("hidden", {"values": narrow(states)}, requests=requests, positions=positions, layers=(2, 5)),
        trace_of("routing", {"experts": experts}, requests=[0, 0, 0], positions=[0, 1, 2], layers=(2, 5)),
        trace_of("score", top, requests=[0], positions=[1]),
        make_request(
            0,
            num_prompt=2,
            num_tokens=2,
            computed=3,
            hidden_rows=3,
            score_top=0,
            id="a",
            group="math",
            metadata='{"a": 1}',
        ),
        make_request(1, num_prompt=1, num_tokens=1, computed=1, hidden_rows=1, score_top=0, id="../b\0c"),
        make_request(2, num_prompt=1, num_tokens=0, finish="error", error="bad", score_top=0, id="d"),
        make_rank(0),
    ]
    return merged(tmp_path / "r.h5", records, num_requests=3)


def test_a_request_has_its_own_rows_of_every_table(path):
    with Results(path) as results:
        assert (len(results), results.ids) == (3, ["a", "../b\0c", "d"])
        assert (results.hidden_layers, results.routed_layers) == ((2, 5), (2, 5))
        first = results["a"]
        assert (first.index, first.finish, first.error) == (0, "length", "")
        expected = widen(narrow(states_of(5, [0, 0, 0], [0, 1, 2])))
        np.testing.assert_array_equal(first.hidden(layer=5), expected)
        assert first.hidden_positions.tolist() == [0, 1, 2]
        assert first.experts[:, 1].tolist() == [[6, 7], [8, 9], [10, 11]]
        assert first.score_top_tokens.tolist() == [[-1, -1], [7, 8]]
        np.testing.assert_array_equal(first.score_top_logprobs, [[np.nan, np.nan], [-0.5, -1]])
        assert [result.index for result in results] == [0, 1, 2]
        assert results[-1].hidden(2).shape == (0, 4)
        assert results[-1].hidden_positions.shape == (0,)
        assert results[2].error == "bad"


def test_routing_is_as_trainers_take_it(path):
    with Results(path) as results:
        whole, lost, failed = (result.routing for result in results)
        assert (whole.dtype, whole.shape) == (np.int16, (3, 2, 2))
        assert whole[:, 0].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert lost.tolist() == [[[-1, -1], [-1, -1]]]
        assert failed.shape == (0, 2, 2)
        assert results[0].routing_weights is None


def test_what_is_not_there_is_named(path):
    with Results(path) as results:
        with pytest.raises(KeyError, match="recorded layers: 2, 5"):
            results["a"].hidden(layer=3)
        with pytest.raises(KeyError):
            results["x"]
        with pytest.raises(IndexError):
            results[3]
        with pytest.raises(AttributeError, match="no logits"):
            _ = results["a"].logits


@pytest.mark.parametrize("name", ["hidden/offsets", "routing/offsets"])
def test_offsets_that_do_not_fit_are_refused(path, name):
    with h5py.File(path, "a") as file:
        file[name][1] = 2**40
    with Results(path) as results, pytest.raises(DataError, match="do not divide"):
        results[0].hidden(2), results[0].experts


def replaced(path, **datasets):
    """The file with other datasets, deleted where None; `__` is `/` in their names."""
    with h5py.File(path, "a") as file:
        for name, values in datasets.items():
            del file[name.replace("__", "/")]
            if values is not None:
                file[name.replace("__", "/")] = values
    return path


@pytest.mark.parametrize(
    ("datasets", "words"),
    [
        ({"routing__experts": np.zeros((3, 30000, 2), np.uint8)}, r"routing/experts: \(3, 30000, 2\) does not fit 2"),
        ({"routing__experts": None}, "routing/experts: is missing"),
        ({"routing__layer": np.array([5, 2], np.int32)}, "routing/layer: does not ascend"),
        ({"hidden__first": np.zeros(1, np.int32)}, "hidden/first: is of 1 requests, not of 3"),
        ({"hidden__layer": np.array([2, 7], np.int32)}, "hidden/values/007: is missing"),
        ({"hidden__layer": np.array([-3, 2], np.int32)}, "hidden/layer: does not ascend"),
    ],
)
def test_tables_that_contradict_themselves_are_refused_on_opening(path, datasets, words):
    with pytest.raises(DataError, match=words):
        Results(replaced(path, **datasets))


def test_weights_of_another_shape_than_the_experts_are_refused_on_opening(path):
    with h5py.File(path, "a") as file:
        file["routing/weights"] = np.zeros((4, 2, 3), np.float32)
    with pytest.raises(DataError, match="routing/weights"):
        Results(path)


@pytest.mark.parametrize("num_rows", [3, 1 << 40])
def test_rows_without_entries_are_refused_however_many(path, num_rows):
    replaced(path, hidden__values__002=None, hidden__offsets=np.array([0, num_rows, num_rows, num_rows]))
    with h5py.File(path, "a") as file:
        file.create_dataset("hidden/values/002", (num_rows, 0), np.float32)
    with Results(path) as results, pytest.raises(DataError, match="rows without entries"):
        _ = results[0].hidden_positions


def test_routing_without_entries_is_refused_by_every_reader(path):
    num_rows = 1 << 40
    replaced(path, routing__offsets=np.array([0, num_rows, num_rows, num_rows]), routing__experts=None)
    with h5py.File(path, "a") as file:
        file.create_dataset("routing/experts", (num_rows, 2, 0), np.uint8)
    for reader in (Results, RoutingFile, lambda path: ReplayFile(path, SMALL)):
        with pytest.raises(DataError, match="rows without entries"):
            reader(path)


def test_routing_takes_no_memory_beyond_its_rows(path):
    layers, wide = np.arange(3000, dtype=np.int32), np.zeros((0, 3000, 30000), np.uint8)
    prompt = np.zeros(10**4, np.int32)
    failed = {"routing__layer": layers, "routing__experts": wide, "routing__offsets": np.zeros(4, np.int64)}
    of_prompt = {"prompt__tokens": prompt, "prompt__offsets": np.array([0, 0, 0, len(prompt)])}
    replaced(path, **failed, **of_prompt, score=None)
    with Results(path) as results:
        assert results[2].routing.shape == (0, 3000, 30000)
        with pytest.raises(DataError, match="request 0 has 0 rows, not 1"):
            _ = results[0].routing


def test_ids_are_read_in_blocks(tmp_path, monkeypatch):
    done = [make_request(i, id=f"é{i}" * (i % 3)) for i in range(50)]
    reads = []
    read = Ragged.read
    with Results(merged(tmp_path / "r.h5", [*done, make_rank(0)], num_requests=50)) as results:
        monkeypatch.setattr(Ragged, "read", lambda self, *bounds: reads.append(bounds) or read(self, *bounds))
        assert results.ids == [record.id for record in done]
        assert results["é1"].index == 1
    assert reads == [(0, 50)]


def named(path):
    with Results(path) as results:
        return {f"{result.index}.{name}": values for result in results for name, values in result.arrays()}


def test_npz_has_the_arrays_of_each_request(path, tmp_path):
    assert ARRAYS["npz"](path, tmp_path / "out.npz") == 3
    with np.load(tmp_path / "out.npz") as found:
        expected = named(path)
        assert sorted(found) == sorted([*expected, "ids", "ids_offsets"])
        ids = np.split(found["ids"], found["ids_offsets"][1:-1])
        assert [one.tobytes().decode() for one in ids] == ["a", "../b\0c", "d"]
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("form", ["npz", "parquet"])
def test_an_export_holds_a_few_requests_in_memory(tmp_path, form, monkeypatch):
    """40 requests of 1 MiB, one of whose ids is 100,000 times as long as the others."""
    monkeypatch.setattr(export_arrays, "_GROUP_BYTES", 2 << 20)
    done = [make_request(i, num_prompt=1 << 18, id=f"{i}" * (100_000 if i == 9 else 1)) for i in range(40)]
    path = merged(tmp_path / "r.h5", [*done, make_rank(0)], num_requests=len(done))
    tracemalloc.start()
    assert ARRAYS[form](path, tmp_path / "out") == len(done)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12 << 20


def test_row_groups_have_several_requests(tmp_path, monkeypatch):
    done = [make_request(i, num_prompt=i % 7) for i in range(300)]
    path = merged(tmp_path / "r.h5", [*done, make_rank(0)], num_requests=len(done))
    ARRAYS["parquet"](path, tmp_path / "one")
    monkeypatch.setattr(export_arrays, "_GROUP_BYTES", 64 << 10)
    ARRAYS["parquet"](path, tmp_path / "several")
    one, several = (pyarrow.parquet.ParquetFile(tmp_path / name) for name in ("one", "several"))
    assert one.num_row_groups == 1
    assert 3 <= several.num_row_groups <= 10
    assert one.read().to_pylist() == several.read().to_pylist()
    assert one.read(["prompt"]).to_pylist() == [{"prompt": record.prompt.tolist()} for record in done]


def test_more_arrays_than_a_safetensors_header_names_are_refused(path, tmp_path, monkeypatch):
    ARRAYS["safetensors"](path, tmp_path / "out.safetensors")
    (num_bytes,) = struct.unpack("<Q", (tmp_path / "out.safetensors").read_bytes()[:8])
    monkeypatch.setattr(export_arrays, "_HEADER_BYTES", num_bytes - 1)
    with pytest.raises(DataError, match="export it as npz or parquet"):
        ARRAYS["safetensors"](path, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_safetensors_has_the_arrays_of_each_request(path, tmp_path):
    assert ARRAYS["safetensors"](path, tmp_path / "out.safetensors") == 3
    with safe_open(tmp_path / "out.safetensors", "np") as found:
        expected = named(path)
        assert sorted(found.keys()) == sorted(expected)
        assert found.metadata() == {"ids": '["a", "../b\\u0000c", "d"]'}
        for name, values in expected.items():
            np.testing.assert_array_equal(found.get_tensor(name), values)


def test_parquet_has_a_row_for_each_request(path, tmp_path):
    assert ARRAYS["parquet"](path, tmp_path / "out.parquet") == 3
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["a", "../b\0c", "d"]
    assert [(row["group"], row["metadata"], row["error"]) for row in rows] == [
        ("math", '{"a": 1}', ""),
        ("", "", ""),
        ("", "", "bad"),
    ]
    assert not {"prompt_id", "endpoint", "reference"} & rows[0].keys()
    assert [row["hidden_positions"] for row in rows] == [[0, 1, 2], [0], []]
    for index, row in enumerate(rows):
        with Results(path) as results:
            for name, values in results[index].arrays():
                np.testing.assert_array_equal(np.array(row[name], values.dtype).reshape(values.shape), values)
