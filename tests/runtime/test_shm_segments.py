"""The folder of MPI's shared memory, where /dev/shm is too small for all ranks of a host."""

import os
import shutil
from types import SimpleNamespace

import pytest

from moempi.errors import ConfigError
from moempi.runtime import shm_segments
from moempi.runtime.launcher import launched_first_of_host, ranks_of_host
from moempi.runtime.shm_segments import FOLDER, PLACES, SEGMENT_BYTES, choose_segment_folder


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A host whose launcher started 4 ranks; free[folder] are the free bytes of each folder."""
    free = {FOLDER: 4 * SEGMENT_BYTES, tmp_path: 100 * SEGMENT_BYTES}
    for name in ("OMPI_MCA_btl", "OMPI_MCA_pml", *PLACES):
        monkeypatch.setenv(name, "")  # so that it is as before after the test, whatever the program sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "0")
    monkeypatch.setattr(shm_segments.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))
    return free


def chosen():
    choose_segment_folder()
    return [os.environ.get(name) for name in PLACES]


def test_a_large_enough_folder_is_used(host):
    assert chosen() == [None, None]


def test_a_small_one_is_got_round_with_one_line(host, tmp_path, capsys):
    host[FOLDER] -= 1
    assert chosen() == [str(tmp_path)] * 2
    line = capsys.readouterr().err
    assert line.startswith("moempi: /dev/shm has 64.00 MiB free, MPI needs 64.00 MiB for 4 ranks: it uses ")


def test_other_ranks_of_the_host_print_nothing(host, tmp_path, capsys, monkeypatch):
    host[FOLDER] = 0
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    assert chosen() == [str(tmp_path)] * 2
    assert capsys.readouterr().err == ""


def test_it_is_an_error_if_both_are_too_small(host, monkeypatch):
    host.update(dict.fromkeys(host, 5 << 20))
    with pytest.raises(ConfigError, match=r"^/dev/shm has 5\.00 MiB free, .* --shm-size=1g\), or set TMPDIR"):
        choose_segment_folder()
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as left:
        choose_segment_folder()
    assert left.value.code == ConfigError.exit_code


@pytest.mark.parametrize(
    ("name", "value"),
    [("OMPI_MCA_btl", "self,tcp"), ("OMPI_MCA_btl", "^sm"), ("OMPI_MCA_pml", "ucx"), (PLACES[0], "/own")],
)
def test_an_mpi_without_these_files_and_a_chosen_folder_stay_as_they_are(host, monkeypatch, name, value):
    host[FOLDER] = 0
    monkeypatch.setenv(name, value)
    assert chosen() == [value if name == place else None for place in PLACES]


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "16"}, 16),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x12),3"}, 4),
    ],
)
def test_launchers_say_how_many_ranks_a_host_has(environment, ranks):
    assert ranks_of_host(environment) == ranks
    assert launched_first_of_host(environment)
    assert not launched_first_of_host(environment | {"SLURM_LOCALID": "1"})
