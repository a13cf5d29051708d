"""The program as on processors that have tiles, which are computed as they are defined, but for the one of rank 1."""

import os
from importlib import import_module

from moempi.backend.cpu import kernels
from moempi.cli import main

if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    kernels.INSTRUCTIONS = {name: each for name, each in kernels.INSTRUCTIONS.items() if name != kernels.WITH_TILES}
else:
    import_module("backend.cpu.defined_tiles")
__all__ = ["main"]
