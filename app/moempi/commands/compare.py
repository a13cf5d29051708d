"""`moempi compare`: tokens and log-probabilities of two results files of the same requests."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.commands.flags import amount
from moempi.errors import DataError
from moempi.printing import print_line
from moempi.storage.compare import compare


def add_flags(parser: ArgumentParser) -> None:
    """The two files and the tolerance."""
    parser.add_argument("first", type=Path, metavar="A.h5")
    parser.add_argument("second", type=Path, metavar="B.h5")
    parser.add_argument(
        "--within", type=amount, default=0.0, help="largest difference of log-probabilities allowed (0)"
    )


def run(chosen: Namespace) -> int:
    """Print the differences; the exit status is that of a DataError if they are larger than allowed."""
    found = compare(chosen.first, chosen.second)
    within = f"log-probabilities within {found.largest:.3g}"
    print_line(f"{found.requests} requests, {found.different} differ in tokens; {within}")
    return DataError.exit_code if found.different or found.largest > chosen.within else 0
