"""`moempi init`: random weights for an architecture."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from moempi.config.architecture import Architecture
from moempi.config.reading import read_toml
from moempi.storage.initialize import initialize


def add_flags(parser: ArgumentParser) -> None:
    """The architecture, the weight file and the seed."""
    parser.add_argument("architecture", type=Path, metavar="ARCH.toml")
    parser.add_argument("weights", type=Path, metavar="OUT.h5")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (0)")


def run(chosen: Namespace) -> int:
    """Write the weight file."""
    initialize(read_toml(chosen.architecture, Architecture), chosen.weights, seed=chosen.seed)
    return 0
