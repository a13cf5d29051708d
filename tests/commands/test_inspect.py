"""`moempi inspect`: the printed tables of a weight file and of any other HDF5 file."""

import h5py
import pytest

from moempi import cli
from moempi.storage import hdf5
from storage.models import SMALL, write_model


@pytest.fixture
def shown(capsys):
    """`shown(path)` is the printed text."""

    def show(path):
        assert cli.main(["inspect", str(path)]) == 0
        return capsys.readouterr().out

    return show


def row(text, first):
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return next(line[1:] for line in cells if line and line[0] == first)


def test_a_weight_file_shows_its_model_and_the_bytes_of_its_parts(shown, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    fingerprint = write_model(tmp_path / "model.h5")
    text = shown(tmp_path / "model.h5")
    assert row(text, "fingerprint") == [fingerprint]
    assert row(text, "MoE layers") == [f"{len(SMALL.moe_layers)} of {SMALL.num_layers}"]
    assert row(text, "experts.router.top_k") == ["2"]
    assert row(text, "experts") == ["6", "864", "1,728"]


def test_markup_in_names_and_values_is_escaped(shown, tmp_path, monkeypatch):
    monkeypatch.setattr("moempi.storage.inspect.MAX_DATASETS", 1)
    with h5py.File(tmp_path / "results.h5", "w") as file:
        hdf5.write_attribute(file, "host", "node [bold]7")
        for name in ("a[red]", "b"):
            hdf5.create_dataset(file, name, dtype="float32", shape=(4, 2))
    text = shown(tmp_path / "results.h5")
    assert row(text, "host") == ["node [bold]7"]
    assert row(text, "a[red]") == ["(4, 2)", "float32", ""]
    assert "and 1 more" in text
