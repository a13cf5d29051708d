"""A test with a planted fault in the kernels: `python tests/simt/planted.py OLD NEW PYTEST ARGUMENTS`.

Wherever the source of a kernel has the text OLD, it has NEW.
"""

import sys

import pytest

from moempi.backend.cuda.device import Kernel

if __name__ == "__main__":
    old, new, *arguments = sys.argv[1:]
    plain = Kernel.source.fget
    Kernel.source = property(lambda kernel: plain(kernel).replace(old, new))
    sys.exit(pytest.main(["-q", "-x", "-s", "-p", "no:cacheprovider", *arguments]))
