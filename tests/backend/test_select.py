"""The selection of the backend, and what the user is told of a GPU that is not used."""

import logging
import tempfile

import pytest

from moempi.backend import select
from moempi.config.job import RunSection
from moempi.errors import ConfigError


@pytest.fixture
def broken_cupy(monkeypatch):
    monkeypatch.setattr(select, "find_gpus", lambda: (0, "CuPy does not load: libcublas.so.12"))


@pytest.mark.parametrize(
    ("backend", "local_rank", "has_gpu", "warnings"),
    [("auto", 0, True, 1), ("auto", 1, True, 0), ("auto", 0, False, 0), ("numpy", 0, True, 0)],
)
def test_an_unused_gpu_is_one_warning_a_node(monkeypatch, caplog, broken_cupy, backend, local_rank, has_gpu, warnings):
    monkeypatch.setattr(select, "_seems_to_have_gpu", lambda: has_gpu)
    with caplog.at_level(logging.WARNING):
        made = select.make_backend(RunSection(backend=backend), local_rank=local_rank, device_buffers=False)
    assert made.name == "numpy"
    assert [("libcublas" in record.message) for record in caplog.records] == [True] * warnings


def test_nvidia_smi_is_a_sign_of_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    before = select._seems_to_have_gpu()
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert select._seems_to_have_gpu()
    assert before == select.Path("/dev/nvidia0").exists()


def test_a_required_gpu_that_is_not_found_is_an_error_and_the_others_count_none(broken_cupy):
    with pytest.raises(ConfigError, match="libcublas"):
        select.count_gpus(RunSection(backend="cupy"))
    assert [select.count_gpus(RunSection(backend=name)) for name in ("auto", "numpy")] == [0, 0]


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """The folder for compiled kernels that the user gets if `tmp_path` is the node's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUPY_CACHE_DIR", "")  # so that the test's end removes what it sets
    monkeypatch.delenv("CUPY_CACHE_DIR")
    return tmp_path / f"moempi-cupy-{select.os.geteuid()}"


def test_compiled_kernels_are_kept_on_the_node_unless_the_user_names_a_folder(temporary, monkeypatch):
    select.keep_kernels_on_node()
    assert select.os.environ["CUPY_CACHE_DIR"] == str(temporary)
    assert temporary.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("CUPY_CACHE_DIR", "/elsewhere")
    select.keep_kernels_on_node()
    assert select.os.environ["CUPY_CACHE_DIR"] == "/elsewhere"


@pytest.mark.parametrize("kind", ["file", "link", "writable"])
def test_no_kernels_are_taken_from_a_folder_of_others(temporary, tmp_path, kind):
    if kind == "file":
        temporary.write_text("")
    elif kind == "link":
        temporary.symlink_to(tmp_path)
    else:
        temporary.mkdir()
        temporary.chmod(0o777)
    select.keep_kernels_on_node()
    assert "CUPY_CACHE_DIR" not in select.os.environ
