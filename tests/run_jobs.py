"""Runs command lines of the program one after another, in the ranks of one mpirun: run_jobs.py MODULE FOLDER

MODULE has the program's `main`. Rank R reads the FIFO FOLDER/R.jobs: each line is a command line, a list of words in
JSON. What the ranks write is in FOLDER/0.out and 0.err, then in 1.out and so on, and the exit code of rank R in 0.R, as
soon as it has ended. The end of the FIFO ends the program: the process of the tests has closed it, or has ended.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TextIO


def write_into(path: Path, descriptor: int) -> None:
    """From now on, what this process writes to a descriptor is appended to a file, as by the other ranks."""
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(opened, descriptor)
    os.close(opened)


def exit_code(main: Callable[[list[str]], object], words: list[str]) -> int:
    """The exit code of `sys.exit(main(words))`, which writes a text to stderr."""
    try:
        status = main(words)
    except SystemExit as ending:
        status = ending.code
    if status is None or isinstance(status, int):
        return int(status or 0)
    print(status, file=sys.stderr)
    return 1


def open_fifo(path: Path) -> TextIO:
    """The FIFO, which is at its end if the process of the tests, which has opened it before, has ended meanwhile."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # otherwise to open it waits for another writer
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor)


def run() -> None:
    main, folder, rank = import_module(sys.argv[1]).main, Path(sys.argv[2]), os.environ["OMPI_COMM_WORLD_RANK"]
    with open_fifo(folder / f"{rank}.jobs") as jobs:
        for number, line in enumerate(jobs):
            write_into(folder / f"{number}.out", 1)
            write_into(folder / f"{number}.err", 2)
            code = exit_code(main, json.loads(line))
            sys.stdout.flush()
            ended = folder / f"{number}.{rank}"
            ended.with_suffix(f".{rank}-new").write_text(str(code))
            ended.with_suffix(f".{rank}-new").rename(ended)  # whole as soon as it is there


if __name__ == "__main__":
    run()
