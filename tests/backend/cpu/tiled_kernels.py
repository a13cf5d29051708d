"""Kernels whose products use tiles: the processor's, if it has some, and tiles computed as they are defined."""

from functools import cache

from moempi.backend.c_compiler import load_kernel
from moempi.backend.cpu.kernels import SOURCES, WITH_TILES, Kernels, compiler_flags, instructions, load_kernels


@cache
def tiled_kernels():
    """The kernels by name."""
    if load_kernels() is None:
        return {}
    found = {f"{name}, as defined": defined(name) for name in ("AVX-512", "AVX2") if name in instructions()}
    if WITH_TILES in instructions():
        found["AMX"] = load_kernels(WITH_TILES)
    return {name: of for name, of in found.items() if of is not None and of.request_tiles()}


def defined(name):
    """Kernels whose tiles compute what the processor's are defined to compute, with other instructions."""
    library = load_kernel(SOURCES, (*compiler_flags(name), "-DTILES_AS_DEFINED"))
    return None if library is None else Kernels(library)
