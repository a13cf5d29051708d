"""The lock on a job's output, so that two runs never write the same results file."""

import fcntl
import logging
import os
from pathlib import Path

from moempi.errors import StorageError
from moempi.printing import printable
from moempi.storage.files import is_in_place
from moempi.storage.journal import journals_folder

log = logging.getLogger(__name__)


class OutputLock:
    """Exclusive lock on an output, held from construction until `release` or the end of this process.

    It is a kernel lock (flock) on a file in the journals' folder; the file names the holder. If the file system has no
    locks, the run continues with a warning. Raises StorageError if another process holds the lock or the disk fails.
    """

    def __init__(self, results_path: str | Path) -> None:
        self._results = results_path
        self.path = journals_folder(results_path) / "lock"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open_locked()
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, printable(_self_description()).encode(), 0)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be written: {error.strerror}") from error

    def require_in_place(self) -> None:
        """Raise StorageError if the file was removed or replaced: another run may hold the output as well."""
        try:
            in_place = is_in_place(self._file, self.path)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read: {error.strerror}") from error
        if not in_place:
            raise StorageError(
                f"{self.path}: was removed or replaced during the run, another run may write {self._results}; run again"
            )

    def release(self) -> None:
        """Release the lock; later calls do nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open_locked(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._acquire(file)
                if is_in_place(file, self.path):
                    return file
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # the holder finished and removed the file meanwhile: try again with a new file

    def _acquire(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 1024, 0).decode(errors="replace").strip() or "it does not say which"
            raise StorageError(
                f"{self._results}: another run writes it ({holder}); wait for its end or choose another output.results"
            ) from error
        except OSError as error:
            log.warning("%s: no lock: %s; start no second run of this job", self.path, error.strerror)


def _self_description() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {os.uname().nodename}" + (f", Slurm job {job}" if job else "")
