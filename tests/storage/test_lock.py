"""Two processes never write one results file."""

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
    """Another process that holds the lock; it dies at the end of its input."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "r.h5")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.communicate()


def test_the_second_is_refused_and_told_who_has_it(tmp_path, holder):
    with pytest.raises(StorageError, match=rf"r\.h5: another run writes it \(process {holder.pid} on .*\); wait"):
        OutputLock(tmp_path / "r.h5")


def test_a_holder_that_dies_holds_it_no_more(tmp_path, holder):
    holder.communicate()
    OutputLock(tmp_path / "r.h5").release()


def test_release_lets_the_next_one_have_it(tmp_path):
    for _ in range(2):
        lock = OutputLock(tmp_path / "r.h5")
        lock.release()
        lock.release()


def test_a_lock_whose_folder_was_removed_meanwhile_does_not_count(tmp_path, monkeypatch):
    first = OutputLock(tmp_path / "r.h5")
    take = OutputLock._take

    def take_late(self, file):
        monkeypatch.undo()
        remove_journals(tmp_path / "r.h5")
        first.release()
        journals_folder(tmp_path / "r.h5").mkdir()
        take(self, file)

    monkeypatch.setattr(OutputLock, "_take", take_late)
    second = OutputLock(tmp_path / "r.h5")
    assert second.path.exists()
    with pytest.raises(StorageError, match="another run"):
        OutputLock(tmp_path / "r.h5")


def test_an_output_that_cannot_be_locked(tmp_path):
    (tmp_path / "r.h5.parts").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        OutputLock(tmp_path / "r.h5")
