"""A forked process computes with threads of its own, whatever its parent's threads did when it began."""

import pytest

from moempi.backend.cpu.kernels import load_kernels
from mpirun import execute, python

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or a processor without kernels")

FORKS = """
import os, time
import numpy as np
from moempi.backend.cpu.kernels import MatrixProduct, load_kernels

kernels = load_kernels()
x, stored = np.random.default_rng(0).standard_normal((2, 256, 256), np.float32)
matrix = kernels.pack([stored], transposed=False)

def product():
    out = np.empty((256, 256), np.float32)
    kernels.multiply(x, [MatrixProduct(matrix, 256)], out, narrow=False, rounded=False)
    return out

expected = product()
for number in range(50):
    assert kernels.use_threads(3) == 3
    np.testing.assert_array_equal(product(), expected)
    time.sleep(number % 5 * 0.0003)  # helpers spin, or go to sleep, or are asleep
    child = os.fork()
    if child == 0:
        same = [np.array_equal(product(), expected)]  # alone
        assert kernels.use_threads(3) == 3
        for pause in (0, 0, 0.002, 0.002):
            time.sleep(pause)
            same.append(np.array_equal(product(), expected))
        os._exit(0 if all(same) else 1)
    assert os.waitpid(child, 0)[1] == 0, number
"""


def test_a_fork_computes_with_threads_of_its_own():
    ended = execute(*python("-c", FORKS))
    assert ended.code == 0, ended.err
