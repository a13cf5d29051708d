import h5py
import numpy as np
import pytest

from moempi.errors import DataError, NoInputError
from moempi.storage import hdf5
from moempi.storage.inspect import DatasetContents, PartSize, inspect, num_active_parameters, num_parameters
from storage.models import SMALL, write_model


def test_parameters_are_counted():
    attention = (16 + 8 + 8 + 16) * 8 + 2 * 4
    expert = 3 * 6 * 8
    outside = 2 * 150 * 8 + 8 + 3 * (attention + 2 * 8) + 3 * 70 * 8 + 2 * 3 * 8
    assert num_parameters(SMALL) == outside + 2 * 3 * expert
    assert num_active_parameters(SMALL) == outside + 2 * 2 * expert


def test_weight_file(tmp_path):
    fingerprint = write_model(tmp_path / "model.h5")
    found = inspect(tmp_path / "model.h5")
    assert (found.path, found.fingerprint) == (tmp_path / "model.h5", fingerprint)
    assert found.architecture == SMALL
    assert PartSize("experts", 6, 864, 1728) in found.parts
    assert PartSize("dense", 3, 1680, 3360) in found.parts


def test_any_other_file(tmp_path):
    with h5py.File(tmp_path / "results.h5", "w") as file:
        hdf5.write_attribute(file, "host", "node [bold]7")
        dataset = hdf5.create_dataset(file, "timing/compute", dtype="float32", shape=(4, 2))
        hdf5.write_attribute(file, "units", "s", owner=dataset)
        hdf5.create_dataset(file, "rows", dtype="bfloat16", shape=(3,))
        file["texts"] = ["a", "b"]
        file.attrs["pair"] = np.arange(2)
    found = inspect(tmp_path / "results.h5")
    assert found.attributes["host"] == "node [bold]7"
    assert found.attributes["pair"].startswith("(not shown")
    assert DatasetContents("timing/compute", (4, 2), "float32", "s") in found.datasets
    assert DatasetContents("rows", (3,), "bfloat16", "") in found.datasets
    assert DatasetContents("texts", (2,), "text", "") in found.datasets
    assert found.num_left_out == 0


def test_a_long_list_of_datasets_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("moempi.storage.inspect.MAX_DATASETS", 2)
    with h5py.File(tmp_path / "results.h5", "w") as file:
        for name in "abc":
            hdf5.create_dataset(file, name, dtype="float32", shape=(1,))
    found = inspect(tmp_path / "results.h5")
    assert ([dataset.name for dataset in found.datasets], found.num_left_out) == (["a", "b"], 1)


def test_refusals(tmp_path):
    with pytest.raises(NoInputError):
        inspect(tmp_path / "nowhere.h5")
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["rows"] = h5py.ExternalLink("other.h5", "rows")
    with pytest.raises(DataError, match=r"linked\.h5: rows: soft and external links are refused"):
        inspect(tmp_path / "linked.h5")
