"""`moempi export`: a results file as JSON lines."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.storage.export import export


def add_flags(parser: ArgumentParser) -> None:
    """The results file and the file of JSON lines."""
    parser.add_argument("results", type=Path, metavar="RESULTS.h5")
    parser.add_argument("lines", type=Path, metavar="OUT.jsonl")


def run(chosen: Namespace) -> int:
    """Write one line a request."""
    export(chosen.results, chosen.lines)
    return 0
