"""Outputs: no input is replaced, links are written through, and what cannot be written is refused at once."""

import os

import pytest

from moempi.errors import StorageError
from moempi.storage.files import atomic, check_output


@pytest.fixture
def folder(tmp_path):
    """A folder with the input `in`, a hard link and symbolic links to it, and an `other` file."""
    (tmp_path / "in").write_text("input")
    (tmp_path / "other").write_text("other")
    (tmp_path / "empty").touch()
    (tmp_path / "hard").hardlink_to(tmp_path / "in")
    (tmp_path / "soft").symlink_to("in")
    (tmp_path / "chain").symlink_to("soft")
    (tmp_path / "out").symlink_to("new")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def check(path, *, inputs=(), force=False):
    check_output(path, inputs=inputs, replaceable=lambda path: path.read_bytes().startswith(b"input"), force=force)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["in", "hard", "soft", "chain", "here/in", "folder/../in"])
def test_an_input_is_refused_by_any_name(folder, name, force):
    with pytest.raises(StorageError, match="same file as the input"):
        check(folder / name, inputs=[folder / "missing", folder / "in"], force=force)


@pytest.mark.parametrize("name", ["new", "folder/new", "here/folder/new", "out"])
def test_a_file_in_an_input_folder_is_refused(folder, name):
    with pytest.raises(StorageError, match="lies in the input"):
        check(folder / name, inputs=[folder])


@pytest.mark.parametrize(
    "name",
    [".", "folder", "fifo", "loop", "/dev/null", "missing/new", "in/new", "n" * 250, "\0", "n" * 5000],
)
def test_what_cannot_be_written_is_refused(folder, name):
    before = sorted(folder.iterdir())
    with pytest.raises(StorageError) as refusal:
        check(folder / name, force=True)
    assert "\n" not in str(refusal.value)
    assert sorted(folder.iterdir()) == before


def test_only_force_replaces_a_file_of_another_kind(folder):
    check(folder / "in")
    check(folder / "empty")
    check(folder / "new")
    with pytest.raises(StorageError, match="--force"):
        check(folder / "other")
    check(folder / "other", force=True)


@pytest.mark.parametrize(("link", "target"), [("soft", "in"), ("chain", "in"), ("out", "new")])
def test_links_are_written_through(folder, link, target):
    with atomic(folder / link) as temporary:
        temporary.write_text("written")
    assert (folder / link).is_symlink()
    assert not (folder / target).is_symlink()
    assert (folder / target).read_text() == "written"
    assert not list(folder.glob(".*"))
