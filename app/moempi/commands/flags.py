"""Flags that several commands have, and the job that they name."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from moempi.config.job import Job, read_job_file

MAX_COUNT = 2**31 - 1
MAX_RANKS = 1_000_000
MAX_SEED = 2**63 - 1
MAX_AMOUNT = 1e9
MAX_DIGITS = 20


def add_job_flags(parser: ArgumentParser) -> None:
    """The job file, and overrides of its keys."""
    parser.add_argument("job", type=Path, metavar="JOB.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a job key")


def add_force_flag(parser: ArgumentParser) -> None:
    """Whether an output may replace a file that the command did not write."""
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def read_job(chosen: Namespace) -> Job:
    """The job that the flags name; raises NoInputError, UsageError or ConfigError: see `read_job_file`."""
    return read_job_file(chosen.job, overrides=chosen.set)


def count(text: str) -> int:
    """A flag's value as a whole number above 0; raises ArgumentTypeError for any other text."""
    return whole_number(1, MAX_COUNT)(text)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """A function that reads a flag's value as a whole number; it raises ArgumentTypeError for any other text."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > MAX_DIGITS or not least <= int(text) <= most:
            raise ArgumentTypeError(f"{text[:MAX_DIGITS]} is not a whole number from {least} to {most}")
        return int(text)

    return read


def amount(text: str) -> float:
    """A flag's value as a number from 0 to MAX_AMOUNT; raises ArgumentTypeError for any other text."""
    with suppress(ValueError):
        if 0 <= float(text) <= MAX_AMOUNT:
            return float(text)
    raise ArgumentTypeError(f"{text[:MAX_DIGITS]} is not a number from 0 to {MAX_AMOUNT:g}")
