"""What a download leaves instead of a file: pointers, web pages, replies of the hub, and files that are not whole."""

import re
from pathlib import Path

from moempi.errors import DataError, NoInputError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_BEGIN_BYTES = 64
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")
_REPLIES = (b"Access to model ", b"Invalid username or password", b"Repository not found", b"Entry not found")
_UNFINISHED = ("*.incomplete", ".cache/huggingface/download/*.incomplete", "../../blobs/*.incomplete")


def refuse_placeholder(path: Path, begin: bytes) -> None:
    """Raise DataError if a file that begins with `begin` is something that a download left in the file's place."""
    begin = begin[:_BEGIN_BYTES].lstrip()
    if begin.startswith(_POINTER):
        raise DataError(f"{path}: is a Git LFS pointer, not the file; fetch it in its folder: git lfs pull")
    if begin.lower().startswith(_PAGES) or begin.startswith(_REPLIES):
        raise DataError(
            f"{path}: is a web page or a refusal of the hub, not the file; if the repository is gated, "
            f"accept its terms and download again after: hf auth login"
        )


def refuse_short(path: Path, num_bytes: int) -> None:
    """Raise DataError if the file is shorter than its header says."""
    found = path.stat().st_size
    if found < num_bytes:
        raise DataError(f"{path}: truncated: it has {found:,} of {num_bytes:,} bytes; download it again")


def refuse_unfinished(path: Path) -> None:
    """Raise NoInputError if a file is missing from a folder whose download has not ended."""
    unfinished = [left for pattern in _UNFINISHED for left in path.parent.glob(pattern)]
    if unfinished and not path.exists():
        raise NoInputError(
            f"{path}: is missing: the download has not ended, {unfinished[0]} is not whole; run the download again"
        )


def where_to_get(folder: Path) -> str:
    """How to get the checkpoint if `folder` can be a name on the hub, else ""."""
    if not _HUB_NAME.fullmatch(str(folder)):
        return ""
    return f"; a model of the hub is downloaded first: hf download {folder} --local-dir FOLDER"
