"""Run moempi; fails if a row that must have bfloat16 values has others: `python narrow_rows.py run JOB.toml`."""

import sys

import numpy as np

from moempi.backend.cpu.kernels import Kernels
from moempi.cli import main

multiply, checks = Kernels.multiply, []


def checked(self, x, parts, out, *, narrow, **options):
    checks.append(narrow)
    if narrow and (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF).any():
        raise ValueError(f"rows of {x.shape} are not bfloat16 values")
    return multiply(self, x, parts, out, narrow=narrow, **options)


if __name__ == "__main__":
    Kernels.multiply = checked
    code = main()
    sys.exit(code or not any(checks))
