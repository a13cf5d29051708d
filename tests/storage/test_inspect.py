import io

import h5py
import numpy as np
import pytest
from rich.console import Console

from moempi.errors import DataError, NoInputError
from moempi.storage import hdf5
from moempi.storage.inspect import describe, num_active_parameters, num_parameters
from storage.models import SMALL, write_model


def shown(path):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(describe(path))
    return console.export_text()


def row(text, first):
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return next(line[1:] for line in cells if line and line[0] == first)


def test_parameters_are_counted():
    attention = (16 + 8 + 8 + 16) * 8 + 2 * 4
    expert = 3 * 6 * 8
    outside = 2 * 150 * 8 + 8 + 3 * (attention + 2 * 8) + 3 * 70 * 8 + 2 * 3 * 8
    assert num_parameters(SMALL) == outside + 2 * 3 * expert
    assert num_active_parameters(SMALL) == outside + 2 * 2 * expert


def test_weight_file(tmp_path):
    fingerprint = write_model(tmp_path / "model.h5")
    text = shown(tmp_path / "model.h5")
    assert row(text, "fingerprint") == [fingerprint]
    assert row(text, "MoE layers") == ["2 of 3"]
    assert row(text, "experts.router.top_k") == ["2"]
    assert row(text, "experts") == ["6", "864", "1,728"]
    assert row(text, "dense") == ["3", "1,680", "3,360"]


def test_any_other_file(tmp_path):
    with h5py.File(tmp_path / "results.h5", "w") as file:
        hdf5.write_attribute(file, "host", "node [bold]7")
        dataset = hdf5.create_dataset(file, "timing/compute", dtype="float32", shape=(4, 2))
        hdf5.write_attribute(file, "units", "s", owner=dataset)
        hdf5.create_dataset(file, "rows", dtype="bfloat16", shape=(3,))
        file["texts"] = ["a", "b"]
        file.attrs["pair"] = np.arange(2)
    text = shown(tmp_path / "results.h5")
    assert row(text, "host") == ["node [bold]7"]
    assert row(text, "pair")[0].startswith("(not shown")
    assert row(text, "timing/compute") == ["(4, 2)", "float32", "s"]
    assert row(text, "rows") == ["(3,)", "bfloat16", ""]
    assert row(text, "texts") == ["(2,)", "text", ""]


def test_refusals(tmp_path):
    with pytest.raises(NoInputError):
        describe(tmp_path / "nowhere.h5")
    with h5py.File(tmp_path / "linked.h5", "w") as file:
        file["rows"] = h5py.ExternalLink("other.h5", "rows")
    with pytest.raises(DataError, match=r"linked\.h5: rows: soft and external links are refused"):
        describe(tmp_path / "linked.h5")
