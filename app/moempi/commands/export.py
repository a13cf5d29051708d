"""`moempi export`: a results file as JSON lines, of this program or of OpenAI's batch API, or as arrays."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.commands.flags import add_force_flag
from moempi.errors import UsageError
from moempi.printing import print_line
from moempi.storage.export import STDOUT, export, own_lines
from moempi.storage.export_arrays import export_npz, export_parquet, export_safetensors
from moempi.storage.export_openai import openai_lines
from moempi.storage.files import check_output

FORMATS = {"jsonl": own_lines, "openai": openai_lines}
ARRAYS = {"parquet": export_parquet, "npz": export_npz, "safetensors": export_safetensors}


def add_flags(parser: ArgumentParser) -> None:
    """The results file, the output, and its format."""
    parser.add_argument("results", type=Path, metavar="RESULTS.h5")
    parser.add_argument("lines", metavar="OUT", help="- for stdout, of lines")
    formats = "jsonl, or openai: output lines of its batch API; parquet, npz, safetensors: also what was recorded"
    parser.add_argument("--format", choices=[*FORMATS, *ARRAYS], default="jsonl", help=formats)
    add_force_flag(parser)


def run(chosen: Namespace) -> int:
    """Write one line a request, with `openai` one line a prompt, or the arrays of all requests."""
    if chosen.format in ARRAYS and chosen.lines == STDOUT:
        raise UsageError(f"--format {chosen.format} writes a file; name it")
    if chosen.lines != STDOUT:
        check_output(chosen.lines, inputs=[chosen.results], force=chosen.force)
    if chosen.format in ARRAYS:
        num_requests = ARRAYS[chosen.format](chosen.results, chosen.lines)
    else:
        num_requests = export(chosen.results, chosen.lines, lines=FORMATS[chosen.format])
    if chosen.lines != STDOUT:
        print_line(f"wrote {chosen.lines}: {num_requests:,} request{'s' * (num_requests != 1)}")
    return 0
