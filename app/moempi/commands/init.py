"""`moempi init`: random weights for an architecture."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.commands.flags import MAX_SEED, add_force_flag, whole_number
from moempi.config.architecture import read_architecture_file
from moempi.config.size import format_size
from moempi.printing import print_line
from moempi.storage.files import check_output
from moempi.storage.initialize import initialize


def add_flags(parser: ArgumentParser) -> None:
    """The architecture, the weight file and the seed."""
    parser.add_argument("architecture", type=Path, metavar="ARCH.toml")
    parser.add_argument("weights", type=Path, metavar="OUT.h5")
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0, help="seed of the random weights (0)")
    add_force_flag(parser)


def run(chosen: Namespace) -> int:
    """Write the weight file."""
    check_output(chosen.weights, inputs=[chosen.architecture], force=chosen.force)
    initialize(read_architecture_file(chosen.architecture), chosen.weights, seed=chosen.seed)
    size = format_size(chosen.weights.stat().st_size)
    print_line(f"wrote {chosen.weights}: random numbers of seed {chosen.seed}, {size}, without a tokenizer")
    return 0
