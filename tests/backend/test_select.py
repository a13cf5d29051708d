"""The selection of the backend, and the warning that a GPU is not used."""

import logging
import sys
from types import SimpleNamespace

import pytest

from moempi.backend import select
from moempi.backend.cpu.backend import NumpyBackend
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


def test_a_cpu_computes_with_compiled_kernels_if_there_are_any(monkeypatch):
    made = []
    monkeypatch.setattr(select, "CompiledBackend", lambda *given, **options: made.append((given, options)))
    run = RunSection(backend="numpy", precision="bfloat16")
    monkeypatch.setattr(select, "load_kernels", lambda: None)
    assert type(select.make_backend(run, local_rank=0, device_buffers=False)) is NumpyBackend
    kernels = SimpleNamespace()
    monkeypatch.setattr(select, "load_kernels", lambda: kernels)
    select.make_backend(run, local_rank=0, device_buffers=False, threads=3)
    ((given, options),) = made
    assert given == (kernels,)
    assert (options["precision"], options["threads"]) == ("bfloat16", 3)


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


def test_without_a_driver_cupy_is_not_imported(monkeypatch):
    def refuse(name):
        raise OSError(f"{name}: cannot open shared object file")

    select._has_driver.cache_clear()
    monkeypatch.setattr(select.ctypes, "CDLL", refuse)
    monkeypatch.setattr(select, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "moempi.backend.cuda.cupy_device", None)  # an import would be another problem
    assert select.find_gpus() == (0, "there is no CUDA driver (libcuda.so.1)")
    select._has_driver.cache_clear()
