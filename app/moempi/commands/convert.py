"""`moempi convert`: a checkpoint folder as one weight file."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.commands.flags import add_force_flag
from moempi.config.size import format_size
from moempi.printing import print_line
from moempi.storage.convert import convert
from moempi.storage.files import check_output


def add_flags(parser: ArgumentParser) -> None:
    """The folder and the weight file."""
    parser.add_argument("checkpoint", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    parser.add_argument("weights", type=Path, metavar="OUT.h5")
    add_force_flag(parser)


def run(chosen: Namespace) -> int:
    """Convert the checkpoint."""
    check_output(chosen.weights, inputs=[chosen.checkpoint], force=chosen.force)
    made = convert(chosen.checkpoint, chosen.weights)
    notes = f", {made.num_rounded:,} tensors rounded to bfloat16" if made.num_rounded else ""
    print_line(f"wrote {chosen.weights}: {made.num_tensors:,} tensors, {format_size(made.num_bytes)}{notes}")
    if made.num_other_parts:
        print_line(f"{chosen.checkpoint}: left out {made.num_other_parts:,} tensors of its parts for images or sound")
    if not made.has_tokenizer:
        print_line(f"{chosen.checkpoint}: holds no tokenizer: prompts for {chosen.weights} are lists of tokens")
    return 0
