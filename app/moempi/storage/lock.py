"""The lock on a job's output, so that two runs never write the same results file.

It is a lock of an open file description: like flock, it ends with the process that opened the file, but whether it is
held can be queried without acquiring it.
"""

import fcntl
import logging
import os
import struct
from pathlib import Path

from moempi.errors import StorageError
from moempi.printing import printable
from moempi.storage.files import is_in_place
from moempi.storage.journal import journals_folder

log = logging.getLogger(__name__)

_FLOCK = struct.Struct("hhqqi0q")  # l_type, l_whence, l_start, l_len (0: the whole file), l_pid of <fcntl.h>
_WHOLE_FILE = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def lock_path(results_path: str | Path) -> Path:
    """The file whose lock the run that writes `results_path` holds."""
    return journals_folder(results_path) / "lock"


def is_locked(results_path: str | Path) -> bool | None:
    """Whether a run holds the lock on an output; None if that is unknown, as on a file system without locks.

    Other nodes' runs are seen only where the file system shares its locks. Never keeps another run from the lock.
    """
    try:
        file = os.open(lock_path(results_path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    try:
        kind: int = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, _WHOLE_FILE))[0]
        return kind != fcntl.F_UNLCK
    except OSError:
        return None
    finally:
        os.close(file)


def process_name(process: int, host: str, job: str) -> str:
    """How messages name a process: its number, its host, and its Slurm job unless `job` is ""."""
    return printable(f"process {process} on {host}" + (f", Slurm job {job}" if job else ""))


class OutputLock:
    """Exclusive lock on an output, held from construction until `release` or the end of this process.

    The locked file is in the journals' folder and names the holder. If the file system has no locks, the run continues
    with a warning. Raises StorageError if another process holds the lock or the disk fails.
    """

    def __init__(self, results_path: str | Path) -> None:
        self._results = results_path
        self.path = lock_path(results_path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open_locked()
            os.ftruncate(self._file, 0)
            own_name = process_name(os.getpid(), os.uname().nodename, os.environ.get("SLURM_JOB_ID", ""))
            os.pwrite(self._file, own_name.encode(), 0)
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
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except BlockingIOError as error:
            holder = os.pread(file, 1024, 0).decode(errors="replace").strip() or "it does not say which"
            raise StorageError(
                f"{self._results}: another run writes it ({holder}); wait for its end or choose another output.results"
            ) from error
        except OSError as error:
            log.warning("%s: no lock: %s; start no second run of this job", self.path, error.strerror)
