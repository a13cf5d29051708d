"""The program as on a processor without AVX-512."""

from moempi.backend.cpu import kernels
from moempi.cli import main

kernels.instructions = lambda: ["AVX2"]
__all__ = ["main"]
