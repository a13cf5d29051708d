"""`moempi export`: a results file as JSON lines."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.commands.flags import add_force_flag
from moempi.printing import print_line
from moempi.storage.export import export
from moempi.storage.files import check_output


def add_flags(parser: ArgumentParser) -> None:
    """The results file and the file of JSON lines."""
    parser.add_argument("results", type=Path, metavar="RESULTS.h5")
    parser.add_argument("lines", type=Path, metavar="OUT.jsonl")
    add_force_flag(parser)


def run(chosen: Namespace) -> int:
    """Write one line a request."""
    check_output(chosen.lines, inputs=[chosen.results], force=chosen.force)
    num_requests = export(chosen.results, chosen.lines)
    print_line(f"wrote {chosen.lines}: {num_requests:,} request{'s' * (num_requests != 1)}")
    return 0
