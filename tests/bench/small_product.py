"""The program whose `bench product` measures arrays that a cache holds, instead of hundreds of megabytes."""

from moempi.bench import product
from moempi.cli import main

product.ROUNDS = 2000
product.READ_BYTES = product.MATRICES_BYTES = 1 << 20
__all__ = ["main"]
