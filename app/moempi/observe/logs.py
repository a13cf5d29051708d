"""Log files of the ranks, beside the results."""

import logging
from pathlib import Path

from moempi.errors import StorageError

LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def logs_folder(results: str | Path) -> Path:
    """The folder of a run's log files: `<results>.logs`."""
    return Path(f"{results}.logs")


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
    file.setFormatter(logging.Formatter(LINE))
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        screen = logging.StreamHandler()
        screen.setLevel(logging.WARNING)
        screen.setFormatter(logging.Formatter("moempi: %(message)s"))
        handlers.append(screen)
    logger = logging.getLogger("moempi")
    logger.setLevel(logging.INFO)
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    for handler in handlers:
        logger.addHandler(handler)
