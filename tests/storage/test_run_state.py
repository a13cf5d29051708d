"""The state file of a run."""

import json
import os

import msgspec
import pytest

from moempi.errors import DataError, NoInputError
from moempi.storage.files import atomic, hidden_name, remove_hidden
from moempi.storage.run_state import RunState, read_state, results_identity, state_path, write_state

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


def test_only_the_files_of_a_killed_writer_are_removed(tmp_path):
    results = tmp_path / "r[1].h5"
    hidden_name(results).touch()
    hidden_name(results).mkdir()
    kept = {results, hidden_name(tmp_path / "r1.h5"), tmp_path / ".r[1].h5.notes.part"}
    for path in kept:
        path.touch()
    remove_hidden(results)
    assert set(tmp_path.iterdir()) == kept
