"""Freed arrays leave their memory to the next ones."""

import ctypes
import subprocess
import sys

import pytest

FREED_ARRAYS = """
import sys
from resource import RUSAGE_SELF, getrusage
import numpy as np
from moempi.backend.cpu.heap import keep_freed_memory

def step():
    arrays = [np.ones(size << 18, np.float32) for size in (1, 3, 8)]
    del arrays

if sys.argv[1] == "keep":
    keep_freed_memory()
step()
before = getrusage(RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(getrusage(RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not the GNU C library")
def test_pages_of_freed_arrays_are_cleared_once():
    """The pages that the system gives to 20 steps of three arrays; 12 MiB are 3,072 pages, or 6 huge ones."""
    faults = {
        choice: int(
            subprocess.run([sys.executable, "-c", FREED_ARRAYS, choice], check=True, capture_output=True).stdout
        )
        for choice in ("keep", "return")
    }
    assert 5 * faults["keep"] < faults["return"]
