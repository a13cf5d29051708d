"""The right to report: one rank of a job has it, nobody else on the node can take it, and no rank waits for it long."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moempi.runtime import monitor as module
from moempi.runtime.monitor import Monitor

LIMIT_S = 30.0  # two seconds, and what a busy machine adds


@pytest.fixture
def monitors(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("PMIX_NAMESPACE", f"job-{os.getpid()}")
    made = [Monitor(), Monitor()]
    for rank, monitor in enumerate(made):
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
        monitor.fork()
    yield made
    for monitor in made:
        monitor.release()


def test_one_rank_has_the_right(monitors):
    first, second = monitors
    assert first.acquire_report_right()
    assert not second.acquire_report_right()
    assert first.acquire_report_right()


def test_the_right_ends_with_its_holder(monitors):
    first, second = monitors
    assert first.acquire_report_right()
    os.kill(first._process, signal.SIGKILL)
    os.waitpid(first._process, 0)
    assert second.acquire_report_right()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_does_not_wait_for_a_stopped_monitor(number, monitors):
    first, second = monitors
    os.kill(first._process, number)
    begin = time.monotonic()
    assert first.acquire_report_right()
    assert time.monotonic() - begin < LIMIT_S
    assert not second.acquire_report_right()


def test_a_rank_does_not_wait_at_its_end_for_a_stopped_monitor(monitors):
    process = monitors[0]._process
    os.kill(process, signal.SIGSTOP)
    begin = time.monotonic()
    monitors[0].release()
    assert time.monotonic() - begin < LIMIT_S
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.parametrize("squat", ["file", "link", "others enter", "another user"])
def test_a_folder_of_somebody_else_is_not_used(squat, tmp_path, monkeypatch):
    if squat == "another user" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    squatted, own = tmp_path / "squatted", tmp_path / "own"
    squatted.mkdir()
    own.mkdir()
    folder = squatted / f"moempi-{os.geteuid()}"
    match squat:
        case "file":
            folder.touch()
        case "link":
            folder.symlink_to(own)
        case _:
            folder.mkdir(mode=0o700)
            folder.chmod(0o700 if squat == "another user" else 0o755)
            if squat == "another user":
                os.chown(folder, 12345, -1)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(squatted))
    monkeypatch.setenv("PMIX_NAMESPACE", f"job-{os.getpid()}")
    held = module._lock_report_right()
    assert held is not None
    assert Path(f"/proc/self/fd/{held}").readlink() == Path("/tmp", folder.name, "reports")
    # The lock is one for every other process of the job.
    other = "from moempi.runtime import monitor; print(monitor._lock_report_right())"
    assert subprocess.check_output([sys.executable, "-c", other], text=True) == "None\n"
    monkeypatch.setenv("PMIX_NAMESPACE", "another job")
    assert subprocess.check_output([sys.executable, "-c", other], text=True) != "None\n"
    os.close(held)


def test_without_any_folder_each_rank_prints(monkeypatch):
    monkeypatch.setattr(module, "_open_private", lambda folder: None)
    assert module._lock_report_right() == -1
