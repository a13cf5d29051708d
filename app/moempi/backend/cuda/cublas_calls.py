"""cuBLAS by its C interface, with a given workspace: CuPy refuses every product while a stream is captured.

The names and arguments are CuPy's, so that either computes the products of `cupy_device`. CuPy sets the stream of a
handle in each call, and cuBLAS then drops the workspace; here both are set once.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

from cupy_backends.cuda.libs import cublas

from moempi.backend.values import Array

INT, LONG, POINTER = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
MATRIX, BATCHED_MATRIX = (POINTER, INT, INT), (POINTER, INT, INT, LONG)
"""Address, type and leading dimension, and the distance of the next matrix of a batch."""
SHAPE = (POINTER, INT, INT, INT, INT, INT, POINTER)
"""Handle, both operations, m, n, k, and the factor of the product."""


@cache
def functions() -> SimpleNamespace:
    """`gemmEx` and `gemmStridedBatchedEx`, which raise CUBLASError."""
    return SimpleNamespace(
        gemmEx=_function("cublasGemmEx", *SHAPE, *MATRIX, *MATRIX, POINTER, *MATRIX, INT, INT),
        gemmStridedBatchedEx=_function(
            "cublasGemmStridedBatchedEx",
            *(*SHAPE, *BATCHED_MATRIX, *BATCHED_MATRIX, POINTER, *BATCHED_MATRIX),
            *(INT, INT, INT),
        ),
    )


def set_workspace(handle: int, workspace: Array) -> None:
    """Give a handle, whose stream is set, memory on the device (bytes,); it must outlive the handle."""
    give = _function("cublasSetWorkspace_v2", POINTER, POINTER, ctypes.c_size_t)
    give(handle, workspace.data.ptr, workspace.nbytes)


@cache
def _function(name: str, *arguments: Any) -> Callable[..., Any]:
    """A function of the library that CuPy has loaded."""
    function = ctypes.CDLL(cublas.__file__)[name]
    function.argtypes, function.restype, function.errcheck = arguments, INT, _check
    return function


def _check(status: Any, *_: Any) -> Any:
    cublas.check_status(status)
    return status
