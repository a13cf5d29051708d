"""`moempi export`: a results file as JSON lines, of this program or as OpenAI's batch API writes them."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.commands.flags import add_force_flag
from moempi.printing import print_line
from moempi.storage.export import STDOUT, export, own_lines
from moempi.storage.export_openai import openai_lines
from moempi.storage.files import check_output

FORMATS = {"jsonl": own_lines, "openai": openai_lines}


def add_flags(parser: ArgumentParser) -> None:
    """The results file, the file of JSON lines, and their format."""
    parser.add_argument("results", type=Path, metavar="RESULTS.h5")
    parser.add_argument("lines", metavar="OUT.jsonl", help="- for stdout")
    parser.add_argument("--format", choices=FORMATS, default="jsonl", help="openai: output lines of its batch API")
    add_force_flag(parser)


def run(chosen: Namespace) -> int:
    """Write one line a request, or with `openai` one line a prompt."""
    if chosen.lines != STDOUT:
        check_output(chosen.lines, inputs=[chosen.results], force=chosen.force)
    num_requests = export(chosen.results, chosen.lines, lines=FORMATS[chosen.format])
    if chosen.lines != STDOUT:
        print_line(f"wrote {chosen.lines}: {num_requests:,} request{'s' * (num_requests != 1)}")
    return 0
