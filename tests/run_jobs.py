"""Runs command lines of the program one after another, in the ranks of one mpirun: run_jobs.py MODULE FOLDER PROCESS

MODULE has the program's `main`. FOLDER/0.job, FOLDER/1.job, ... are lists of words in JSON, and appear one by one; what
the ranks write is in FOLDER/0.out and 0.err, and the exit code of rank R in 0.R, as soon as it has ended. An empty list
ends the program, and so does the end of PROCESS, the process of the tests.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import count
from pathlib import Path


def next_words(place: Path) -> list[str]:
    """The command line in a file, as soon as there is one."""
    tests = Path("/proc", sys.argv[3])
    while not place.exists() and tests.exists():
        time.sleep(0.01)
    return json.loads(place.read_text()) if place.exists() else []


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


def run() -> None:
    main, folder, rank = import_module(sys.argv[1]).main, Path(sys.argv[2]), os.environ["OMPI_COMM_WORLD_RANK"]
    for number in count():
        job = folder / f"{number}.job"
        if not (words := next_words(job)):
            break
        write_into(job.with_suffix(".out"), 1)
        write_into(job.with_suffix(".err"), 2)
        code = exit_code(main, words)
        sys.stdout.flush()
        ended = job.with_suffix(f".{rank}")
        ended.with_suffix(f".{rank}-new").write_text(str(code))
        ended.with_suffix(f".{rank}-new").rename(ended)  # whole as soon as it is there


if __name__ == "__main__":
    run()
