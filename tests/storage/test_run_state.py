"""The state file of a run."""

import json
import os
import subprocess
import time

import msgspec
import pytest

from moempi.errors import DataError, NoInputError
from moempi.storage.files import atomic, hidden_name, remove_hidden
from moempi.storage.lock import OutputLock, lock_path
from moempi.storage.run_state import (
    SILENT_S,
    RunState,
    read_state,
    results_identity,
    state_path,
    touch_state,
    write_state,
)

STOPPED = RunState(
    state="stopped",
    requests=9,
    finished=4,
    reason="SIGUSR1",
    exit_code=75,
    world_size=2,
    started="2026-01-01T00:00:00+00:00",
    updated="2026-01-01T00:01:00+00:00",
)


def test_a_state_is_read_as_written_and_is_json(tmp_path):
    write_state(tmp_path / "r.h5", STOPPED)
    assert read_state(tmp_path / "r.h5") == STOPPED
    assert json.loads((tmp_path / "r.h5.run.json").read_text())["state"] == "stopped"
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.h5.run.json"]


def test_a_missing_or_malformed_state_is_an_error(tmp_path):
    with pytest.raises(NoInputError):
        read_state(tmp_path / "r.h5")
    state_path(tmp_path / "r.h5").write_text("{}")
    with pytest.raises(DataError, match="not the state of a run"):
        read_state(tmp_path / "r.h5")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b'{"state": "gone"}',
        b'{"state": ' + b"1" * 5000 + b"}",
        b" " * (2 << 20),
        json.dumps(msgspec.to_builtins(STOPPED) | {"process": 2**70}).encode(),
    ],
)
def test_a_state_that_no_run_wrote_is_one_clear_error(tmp_path, content):
    state_path(tmp_path / "r.h5").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.h5\.run\.json: is"):
        read_state(tmp_path / "r.h5")


def test_a_state_that_is_no_regular_file_is_not_read(tmp_path):
    os.mkfifo(state_path(tmp_path / "r.h5"))
    with pytest.raises(NoInputError, match="not a regular file"):
        read_state(tmp_path / "r.h5")


@pytest.mark.parametrize("state", ["running", "failed"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_is_finished_once_its_results_are_in_place(tmp_path, state, earlier):
    results = tmp_path / "r.h5"
    if earlier:
        results.write_bytes(b"earlier")
    begin = msgspec.structs.replace(STOPPED, state=state, replaces=results_identity(results))
    write_state(results, begin)
    assert read_state(results) == begin
    with atomic(results) as temporary:
        temporary.write_bytes(b"results")
    found = read_state(results)
    assert (found.state, found.finished, found.exit_code, found.reason) == ("finished", 9, 0, "")
    write_state(results, msgspec.structs.replace(begin, state="stopped"))
    assert read_state(results).state == "stopped"
    write_state(results, msgspec.structs.replace(begin, replaces=None))
    assert read_state(results).state == state


@pytest.fixture
def killed():
    """The process number of a process that was killed."""
    process = subprocess.Popen(["sleep", "60"])
    process.kill()
    process.wait()
    return process.pid


def write_running(results, *, host, process):
    state = msgspec.structs.replace(STOPPED, state="running", reason="", exit_code=0, replaces="")
    write_state(results, msgspec.structs.replace(state, host=host, process=process, job="17"))


def fall_silent(results, seconds=SILENT_S + 1):
    then = time.time() - seconds
    os.utime(state_path(results), (then, then))


HERE, ELSEWHERE = os.uname().nodename, "another-host"


@pytest.mark.parametrize("host", [HERE, ELSEWHERE])
def test_a_run_that_holds_its_lock_runs_however_silent(tmp_path, killed, host):
    lock = OutputLock(tmp_path / "r.h5")
    write_running(tmp_path / "r.h5", host=host, process=killed)
    fall_silent(tmp_path / "r.h5")
    assert read_state(tmp_path / "r.h5").state == "running"
    lock.release()
    assert read_state(tmp_path / "r.h5").state == "failed"


def test_a_run_on_this_host_without_its_lock_was_killed(tmp_path):
    results = tmp_path / "r.h5"
    OutputLock(results).release()
    write_running(results, host=HERE, process=os.getpid())
    then = 1_800_000_000
    os.utime(state_path(results), (then, then))
    state = read_state(results)
    assert (state.state, state.exit_code, state.finished) == ("failed", 75, 4)
    name = f"process {os.getpid()} on {HERE}, Slurm job 17"
    assert state.reason == f"killed: {name} was last alive at 2027-01-15T08:00:00+00:00"


def test_a_run_on_another_host_was_killed_once_it_is_silent(tmp_path):
    """Its file system may not share locks between nodes."""
    results = tmp_path / "r.h5"
    OutputLock(results).release()
    write_running(results, host=ELSEWHERE, process=1)
    fall_silent(results, SILENT_S - 30)
    assert read_state(results).state == "running"
    fall_silent(results)
    assert read_state(results).state == "failed"
    touch_state(results)
    assert read_state(results).state == "running"


def test_without_locks_a_run_on_this_host_was_killed_once_its_process_is_gone_or_silent(tmp_path, killed):
    results = tmp_path / "r.h5"
    lock_path(results).parent.mkdir()
    lock_path(results).symlink_to(lock_path(results))  # cannot be opened
    write_running(results, host=HERE, process=os.getpid())
    assert read_state(results).state == "running"
    fall_silent(results)
    assert read_state(results).state == "failed"
    write_running(results, host=HERE, process=killed)
    assert read_state(results).state == "failed"


def test_a_running_state_of_a_version_that_did_not_record_its_host_is_not_judged(tmp_path):
    state_path(tmp_path / "r.h5").write_text(
        '{"state": "running", "requests": 9, "world_size": 2, "started": "then", "updated": "then"}'
    )
    fall_silent(tmp_path / "r.h5")
    assert read_state(tmp_path / "r.h5").state == "running"


def test_a_killed_run_whose_results_are_in_place_is_finished(tmp_path, killed):
    write_running(tmp_path / "r.h5", host=HERE, process=killed)
    (tmp_path / "r.h5").write_bytes(b"results")
    assert read_state(tmp_path / "r.h5").state == "finished"


def test_a_run_that_ends_while_it_is_judged_was_not_killed(tmp_path, monkeypatch):
    results = tmp_path / "r.h5"
    write_running(results, host=HERE, process=os.getpid())

    def is_locked(_):
        write_state(results, msgspec.structs.replace(STOPPED, host=HERE))
        return False

    monkeypatch.setattr("moempi.storage.run_state.is_locked", is_locked)
    assert read_state(results).state == "stopped"


def test_only_the_files_of_a_killed_writer_are_removed(tmp_path):
    results = tmp_path / "r[1].h5"
    hidden_name(results).touch()
    hidden_name(results).mkdir()
    kept = {results, hidden_name(tmp_path / "r1.h5"), tmp_path / ".r[1].h5.notes.part"}
    for path in kept:
        path.touch()
    remove_hidden(results)
    assert set(tmp_path.iterdir()) == kept
