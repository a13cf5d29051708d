"""Arrays that end, or begin, at a page that cannot be accessed: reading or writing beyond them ends the process."""

import ctypes
import mmap

import numpy as np

PAGE = mmap.PAGESIZE
PROT_NONE = 0


def guarded(values, *, at_end=True):
    """A copy of an array whose last byte (or first, if not `at_end`) lies beside a page that cannot be accessed."""
    values = np.ascontiguousarray(values)
    pages = -(-values.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    for page in (0, pages + 1):
        protect(address + page * PAGE)
    first = PAGE + (pages * PAGE - values.nbytes if at_end else 0)
    copy = np.frombuffer(memory, values.dtype, values.size, first).reshape(values.shape)
    copy[...] = values
    return copy


def protect(address):
    library = ctypes.CDLL(None, use_errno=True)
    if library.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
