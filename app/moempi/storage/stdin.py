"""Prompts from stdin: a copy of them beside the results, which rank 0 and a restart read."""

import os
import shutil
import sys
from pathlib import Path

import msgspec

from moempi.config.job import Job
from moempi.config.reading import STDIN
from moempi.errors import DataError, NoInputError, StorageError
from moempi.storage.files import atomic, digest_file
from moempi.storage.journal import journals_folder
from moempi.storage.prompt_form import STDIN_COPY

_FIRST_BYTES = 1 << 20
_MPIRUN = "OMPI_COMM_WORLD_SIZE"
"""Open MPI 5's mpirun never closes the stdin of rank 0, and may repeat what is longer than 64 KiB."""


def with_stdin(job: Job, *, is_reader: bool) -> Job:
    """The job with a file in the place of stdin, which one rank, the reader, fills first; blocks until stdin ends.

    Nothing on stdin stands for the copy that an unfinished run has left. Raises DataError if there is none either,
    NoInputError if stdin cannot be read to its end, StorageError if it differs from the prompts of an unfinished run.
    """
    if job.input.prompts != STDIN:
        return job
    copy = journals_folder(job.output.results) / STDIN_COPY
    if is_reader and not (_MPIRUN in os.environ and copy.exists()):
        _save(copy)
    return msgspec.structs.replace(job, input=msgspec.structs.replace(job.input, prompts=str(copy)))


def _save(copy: Path) -> None:
    if _MPIRUN in os.environ:
        raise NoInputError(
            "stdin: Open MPI's mpirun passes neither its end nor always its content to rank 0; "
            "write the prompts to a file, or start one process without mpirun"
        )
    if sys.stdin is None or sys.stdin.isatty():
        raise NoInputError("stdin: is not a file or a pipe; input.prompts = '-' reads the prompts from it")
    stream = sys.stdin.buffer
    first = stream.read(_FIRST_BYTES)
    if not first:
        if copy.exists():
            return
        raise DataError("stdin: has no prompts")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{copy.parent}: cannot be made: {error.strerror}") from error
    with (
        atomic(copy, before_replace=lambda new: _require_same(new, copy)) as temporary,
        temporary.open("wb") as file,
    ):
        file.write(first)
        shutil.copyfileobj(stream, file)


def _require_same(new: Path, copy: Path) -> None:
    if copy.exists() and digest_file(new) != digest_file(copy):
        raise StorageError(
            f"stdin: differs from {copy}, the prompts of an unfinished run; give the same or none to continue it, "
            f"or remove {copy.parent} to give it up"
        )
