"""Log files of rank 0 and of ranks with warnings, beside the results."""

import logging
from contextlib import suppress
from pathlib import Path

from moempi.errors import StorageError
from moempi.printing import one_line

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
STDERR_LINE = "moempi: %(message)s"


class _LineFormatter(logging.Formatter):
    """A formatter that writes one printable line for each record, whatever its message quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file; a warning for which no file can be made is lost, and ends nothing."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            super().emit(record)


def logs_folder(results: str | Path) -> Path:
    """The folder of a run's log files: `<results>.logs`."""
    return Path(f"{results}.logs")


def log_to_stderr() -> None:
    """Print warnings on stderr as lines, on every rank, until `log_to_files`."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_LineFormatter(STDERR_LINE))


def log_to_files(results: str | Path, rank: int) -> None:
    """Write the log of rank 0 to `<results>.logs/rank-00000.log`, and warnings on stderr.

    Another rank writes a file only if it has a warning. Rank 0 makes the folder and removes the files of earlier runs
    before that. Raises StorageError if it cannot.
    """
    folder = logs_folder(results)
    try:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for earlier in folder.glob("rank-*.log"):
                earlier.unlink()
        file = _LogFile(folder / f"rank-{rank:05d}.log", mode="w", encoding="utf-8", delay=rank > 0)
    except OSError as error:
        raise StorageError(f"{folder}: no log file can be made: {error.strerror}") from error
    file.setFormatter(_LineFormatter(LINE))
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        screen = logging.StreamHandler()
        screen.setLevel(logging.WARNING)
        screen.setFormatter(_LineFormatter(STDERR_LINE))
        handlers.append(screen)
    logger = logging.getLogger("moempi")
    logger.setLevel(logging.WARNING if rank else logging.INFO)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
