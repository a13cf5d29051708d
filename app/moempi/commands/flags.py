"""Flags that several commands have, and the job that they name."""

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from moempi.config.job import Job
from moempi.config.reading import read_toml


def add_job_flags(parser: ArgumentParser) -> None:
    """The job file, and overrides of its keys."""
    parser.add_argument("job", type=Path, metavar="JOB.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a job key")


def add_force_flag(parser: ArgumentParser) -> None:
    """Whether an output may replace a file that the command did not write."""
    parser.add_argument("--force", action="store_true", help="replace an existing file of another kind")


def read_job(chosen: Namespace) -> Job:
    """The job that the flags name; raises NoInputError, UsageError or ConfigError: see `read_toml`."""
    return read_toml(chosen.job, Job, overrides=chosen.set)


def count(text: str) -> int:
    """A flag's value as a whole number above 0; raises ArgumentTypeError for any other text."""
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)
