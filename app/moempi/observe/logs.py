"""Log files of the ranks, beside the results."""

import logging
from pathlib import Path

from moempi.errors import StorageError
from moempi.printing import one_line

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
STDERR_LINE = "moempi: %(message)s"


class _LineFormatter(logging.Formatter):
    """A formatter that writes one printable line for each record, whatever its message quotes."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def logs_folder(results: str | Path) -> Path:
    """The folder of a run's log files: `<results>.logs`."""
    return Path(f"{results}.logs")


def log_to_stderr() -> None:
    """Print warnings on stderr as lines, on every rank, until `log_to_files`."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(_LineFormatter(STDERR_LINE))


def log_to_files(results: str | Path, rank: int) -> None:
    """Write the log of this rank to `<results>.logs/rank-00003.log`; rank 0 also prints warnings on stderr.

    Raises StorageError if the file cannot be created.
    """
    folder = logs_folder(results)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / f"rank-{rank:05d}.log", mode="w", encoding="utf-8")
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
    logger.setLevel(logging.INFO)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
