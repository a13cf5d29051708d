"""`moempi convert`: a checkpoint folder as one weight file."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.storage.convert import convert


def add_flags(parser: ArgumentParser) -> None:
    """The folder and the weight file."""
    parser.add_argument("checkpoint", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    parser.add_argument("weights", type=Path, metavar="OUT.h5")


def run(chosen: Namespace) -> int:
    """Convert the checkpoint."""
    convert(chosen.checkpoint, chosen.weights)
    return 0
