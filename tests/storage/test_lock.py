"""The output lock: two processes never write one results file."""

import shutil
import subprocess
import sys

import pytest

from moempi.errors import StorageError
from moempi.storage.journal import journals_folder, remove_journals
from moempi.storage.lock import OutputLock

HOLDER = """
import os, sys
from moempi.storage.lock import OutputLock
lock = OutputLock(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
os._exit(1)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "r.h5")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


def test_a_second_lock_is_refused_with_the_name_of_the_holder(tmp_path, holder):
    with pytest.raises(StorageError, match=rf"r\.h5: another run writes it \(process {holder.pid} on .*\); wait"):
        OutputLock(tmp_path / "r.h5")


def test_the_lock_of_a_dead_process_is_free(tmp_path, holder):
    holder.communicate()
    OutputLock(tmp_path / "r.h5").release()


def test_a_released_lock_can_be_taken_again(tmp_path):
    for _ in range(2):
        lock = OutputLock(tmp_path / "r.h5")
        lock.release()
        lock.release()


def test_a_lock_on_a_removed_file_is_not_accepted(tmp_path, monkeypatch):
    first = OutputLock(tmp_path / "r.h5")
    acquire = OutputLock._acquire

    def acquire_late(self, file):
        monkeypatch.undo()
        remove_journals(tmp_path / "r.h5")
        first.release()
        journals_folder(tmp_path / "r.h5").mkdir()
        acquire(self, file)

    monkeypatch.setattr(OutputLock, "_acquire", acquire_late)
    second = OutputLock(tmp_path / "r.h5")
    assert second.path.exists()
    with pytest.raises(StorageError, match="another run"):
        OutputLock(tmp_path / "r.h5")


def test_an_output_that_cannot_be_locked(tmp_path):
    (tmp_path / "r.h5.parts").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        OutputLock(tmp_path / "r.h5")


@pytest.mark.parametrize(
    "disturb",
    [
        lambda lock: lock.path.unlink(),
        lambda lock: shutil.rmtree(lock.path.parent),
        lambda lock: lock.path.parent.rename(lock.path.parent.with_name("elsewhere")),
        lambda lock: (shutil.rmtree(lock.path.parent), lock.path.parent.touch()),
        lambda lock: (shutil.rmtree(lock.path.parent), OutputLock(lock._results)),
    ],
    ids=["file removed", "folder removed", "folder moved", "folder replaced", "held by another"],
)
def test_a_lock_that_loses_its_name_is_an_error(tmp_path, disturb):
    lock = OutputLock(tmp_path / "r.h5")
    lock.require_in_place()
    left = disturb(lock)
    with pytest.raises(StorageError, match="was removed or replaced during the run, another run may write"):
        lock.require_in_place()
    del left
