"""Kernels compiled by NVRTC for the GPU at hand, and their launches through the driver.

A kernel is compiled once for each GPU architecture and model shape, and kept in the user's cache folder.
"""

import ctypes
import os
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import xxhash
from cupy.cuda.function import Module
from cupy_backends.cuda.api import driver
from cupy_backends.cuda.libs import nvrtc

from moempi.backend.cuda.device import Argument, ExpertTable, Grid, Kernel
from moempi.backend.kept_files import keep, kept_folder, read_kept
from moempi.errors import ConfigError

OPTIONS = ("-std=c++17", "-ftz=true")
DEFAULT_SHARED_BYTES = 48 << 10
"""Shared memory of a block that needs no permission."""


class CompiledKernel:
    """One kernel, loaded on the current GPU.

    The arguments of a call are packed into memory that is made once.
    """

    def __init__(self, kernel: Kernel, *, architecture: str, shared_bytes: int) -> None:
        self._module = Module()
        self._module.load(compiled(kernel.file, kernel.constants, architecture))
        self._function = self._module.get_function(kernel.name)
        if shared_bytes > DEFAULT_SHARED_BYTES:
            permission = driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            driver.funcSetAttribute(self._function.ptr, permission, shared_bytes)
        self._pointer = self._function.ptr
        self._attribute = LEAST_PRIORITY if kernel.is_preemptible else None
        self._shared_bytes = shared_bytes
        formats = kernel.parameters
        packed = struct.Struct("=" + "".join(formats))
        self._pack, self._words = packed.pack_into, bytearray(packed.size)
        first = np.frombuffer(self._words, np.uint8).ctypes.data
        self._addresses = np.array([first + offset for offset in kernel.offsets], np.uint64)
        self._parameters = int(self._addresses.ctypes.data)

    def __call__(
        self, grid: Grid, threads: int, stream: int, arguments: Sequence[Argument], *, early: bool = False
    ) -> None:
        """Submit one launch to a stream; one that is `early` begins while the kernel before it ends."""
        self._pack(self._words, 0, *_words(arguments))
        shape = (*grid, threads, 1, 1, self._shared_bytes)
        attribute = EARLY if early else self._attribute
        if attribute is not None:
            _launch_with(attribute, self._pointer, shape, stream, self._parameters)
        else:
            driver.launchKernel(self._pointer, *shape, stream, self._parameters, 0)


@cache
def compiled(file: str, constants: tuple[tuple[str, int | None], ...], architecture: str) -> bytes:
    """The machine code of a file with these constants for an architecture such as "sm_90".

    It is kept, or compiled in about a second. Raises RuntimeError with the compiler's messages if it does not compile,
    ConfigError if the compiler is older than the architecture.
    """
    number = int("".join(filter(str.isdigit, architecture)))
    if number not in nvrtc.getSupportedArchs():
        version = ".".join(map(str, nvrtc.getVersion()))
        raise ConfigError(f"the compiler NVRTC {version} does not know {architecture}: install CuPy for a newer CUDA")
    kernel = Kernel(file, "", constants)
    options = (*OPTIONS, f"-arch={architecture}", *kernel.defines)
    text = "\n".join((*options, str(nvrtc.getVersion()), kernel.source))
    folder = kept_folder({os.geteuid(), Path(__file__).stat().st_uid})
    path = (
        folder and folder / f"{Path(kernel.file).stem}-{architecture}-{xxhash.xxh3_128_hexdigest(text.encode())}.cubin"
    )
    code = read_kept(path, {os.geteuid()}) if path else None
    if code is None:
        code = _compile(kernel, options)
        if path:
            keep(code, path)
    return code


def _compile(kernel: Kernel, options: Sequence[str]) -> bytes:
    program = nvrtc.createProgram(kernel.source, kernel.file, (), ())
    try:
        nvrtc.compileProgram(program, options)
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(f"{kernel.file} does not compile: {nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def _words(arguments: Sequence[Any]) -> list[Any]:
    """Addresses of arrays, 0 for None, packed tables, and numbers as they are."""
    return [
        argument.data.ptr
        if (kind := type(argument)) is cupy.ndarray
        else argument.ctypes.data
        if kind is np.ndarray
        else argument.pack(_address)
        if kind is ExpertTable
        else argument or 0
        for argument in arguments
    ]


def _address(values: Any) -> int:
    return 0 if values is None else int(values.data.ptr)


def _attribute(number: int, value: int) -> "ctypes.Array[ctypes.c_char]":
    """A CUlaunchAttribute, whose value begins at byte 8."""
    return ctypes.create_string_buffer(struct.pack("=i4xi", number, value), 72)


PROGRAMMATIC_STREAM_SERIALIZATION, PRIORITY = 6, 8
"""CUlaunchAttributeIDs of a launch that begins early, and of a launch's priority in place of its stream's."""
EARLY, LEAST_PRIORITY = _attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 1), _attribute(PRIORITY, 0)
"""0 is the least priority of a GPU; pending blocks of higher priorities, which are negative, are scheduled first."""
CONFIG = struct.Struct("=7I4xQQI4x")
"""CUlaunchConfig: grid, block, dynamic shared memory, stream, and the attributes."""


@cache
def _driver() -> ctypes.CDLL:
    """The driver, for calls that CuPy does not offer."""
    return ctypes.CDLL("libcuda.so.1")


@cache
def _launch_kernel_ex() -> Any:
    """The driver's cuLaunchKernelEx (CUDA 11.8)."""
    function = _driver().cuLaunchKernelEx
    function.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return function


USE_NODE_PRIORITY = 8
"""CUgraphInstantiate_flags: a launch in the graph keeps the priority with which it was captured."""


def instantiate_graph(graph: int) -> int:
    """An executable graph of a captured one, in which kernels keep their priorities."""
    executable = ctypes.c_void_p()
    instantiate = _driver().cuGraphInstantiateWithFlags
    driver.check_status(
        instantiate(ctypes.byref(executable), ctypes.c_void_p(graph), ctypes.c_ulonglong(USE_NODE_PRIORITY))
    )
    return executable.value or 0


def _launch_with(attribute: Any, function: int, shape: Sequence[int], stream: int, parameters: int) -> None:
    config = CONFIG.pack(*shape, stream, ctypes.addressof(attribute), 1)
    driver.check_status(_launch_kernel_ex()(config, function, parameters, None))
