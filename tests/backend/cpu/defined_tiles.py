"""The program as on a processor with tiles, which are computed as they are defined."""

from moempi.backend.cpu import kernels
from moempi.cli import main

name = next(each for each in kernels.instructions() if each in ("AVX-512", "AVX2"))
features, flags = kernels.INSTRUCTIONS[name]
kernels.INSTRUCTIONS = {name: (features, (*flags, "-DTILES_AS_DEFINED"))}
__all__ = ["main"]
