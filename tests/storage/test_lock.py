"""The output lock: two processes never write one results file."""

import os
import shutil
import subprocess
import sys
import threading

import pytest

from moempi.errors import StorageError
from moempi.storage.journal import journals_folder, remove_journals
from moempi.storage.lock import OutputLock, is_locked, lock_path

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


def test_whether_a_lock_is_held_can_be_queried(tmp_path, holder):
    assert is_locked(tmp_path / "r.h5") is True
    holder.communicate()
    assert is_locked(tmp_path / "r.h5") is False
    remove_journals(tmp_path / "r.h5")
    assert is_locked(tmp_path / "r.h5") is False
    assert not journals_folder(tmp_path / "r.h5").exists()


def test_queries_never_keep_a_run_from_its_lock(tmp_path):
    ended = threading.Event()

    def query():
        while not ended.is_set():
            is_locked(tmp_path / "r.h5")

    threads = [threading.Thread(target=query) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            OutputLock(tmp_path / "r.h5").release()
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_a_lock_that_cannot_be_opened_is_unknown_and_a_fifo_does_not_block(tmp_path):
    lock = lock_path(tmp_path / "r.h5")
    lock.parent.mkdir()
    lock.symlink_to(lock)
    assert is_locked(tmp_path / "r.h5") is None
    lock.unlink()
    os.mkfifo(lock)
    assert is_locked(tmp_path / "r.h5") is False


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
