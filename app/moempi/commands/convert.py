"""`moempi convert`: a checkpoint folder as one weight file."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.commands.flags import add_force_flag
from moempi.printing import print_line
from moempi.storage.convert import convert
from moempi.storage.files import check_output
from moempi.storage.weights import is_weight_file


def add_flags(parser: ArgumentParser) -> None:
    """The folder and the weight file."""
    parser.add_argument("checkpoint", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    parser.add_argument("weights", type=Path, metavar="OUT.h5")
    add_force_flag(parser)


def run(chosen: Namespace) -> int:
    """Convert the checkpoint."""
    check_output(chosen.weights, inputs=[chosen.checkpoint], replaceable=is_weight_file, force=chosen.force)
    summary = convert(chosen.checkpoint, chosen.weights)
    if not summary.has_tokenizer:
        print_line(f"{chosen.checkpoint}: holds no tokenizer.json: prompts for {chosen.weights} are lists of tokens")
    return 0
