"""`moempi bench product`: the product kernels of the CPU on one core, beside what the core can do at most, and NumPy.

The most is measured by loops of operations on registers and by reading memory, for the same instructions.
Times are of the thread, so that other work on the machine matters less.
"""

import ctypes
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import thread_time
from typing import Any, NamedTuple

import numpy as np

from moempi.arrays import Float32Array, narrow, round_to_bfloat16, widen
from moempi.backend.c_compiler import load_kernel
from moempi.backend.cpu.kernels import (
    FLOAT32,
    SOURCES,
    Kernels,
    MatrixProduct,
    PanelMatrix,
    compiler_flags,
    instructions,
    load_kernels,
)
from moempi.bench.measure import machine
from moempi.commands.flags import count
from moempi.errors import UsageError
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World

SOURCE = Path(__file__).with_name("peak.c")
ROUNDS, TILE_ROUNDS = 2_000_000, 40_000
TILE_VALUES = 2048
"""Numbers of four tiles; they are random, as a processor may be faster with zeros."""
READ_BYTES = 512 << 20
"""More than any cache holds."""
MATRICES_BYTES = 256 << 20
"""Matrices are multiplied in turn, so that a row finds none of its weights in a cache."""


class Peak(NamedTuple):
    """What a core can do at most: operations per second in float32, with bfloat16 pairs and tiles, and bytes read."""

    flops: float
    pair_flops: float
    tile_flops: float
    bytes: float

    def of(self, kind: str) -> float:
        """The operations per second with weights of a kind of `_measure`."""
        return {"float32": self.flops, "bfloat16": max(self.flops, self.pair_flops), "tiles": self.tile_flops}[kind]


def add_flags(parser: ArgumentParser) -> None:
    """The products, and how often."""
    parser.add_argument("--rows", type=count, nargs="+", default=[1, 8, 64, 512], metavar="T", help="rows (1 8 64 512)")
    parser.add_argument("--inputs", type=count, default=2048, metavar="K", help="inputs of a matrix (2048)")
    parser.add_argument("--outputs", type=count, default=6144, metavar="N", help="outputs of a matrix (6144)")
    parser.add_argument("--rounds", type=count, default=7, help="measurements of each (7)")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print. Raises UsageError on several ranks, or without the compiled kernels."""
    names = [name for name in instructions() if load_kernels(name) is not None]
    if world.size > 1:
        raise UsageError("bench product measures one core; start it without a launcher, or on one rank")
    if load_kernels() is None:
        raise UsageError("bench product needs the compiled kernels: a C compiler (cc, or set CC)")
    table = figures_table(
        *("instructions", "rows", "weights", "GFLOP/s", "of peak", "GB/s", "of reading", "NumPy", "times NumPy"),
        title=f"Products with {chosen.inputs:,} x {chosen.outputs:,} matrices on one core",
        caption=machine(world),
    )
    for name in names:
        kernels = load_kernels(name)
        assert kernels is not None
        has_tiles = kernels.request_tiles()
        peak = find_peak(name, has_tiles=has_tiles, rounds=chosen.rounds)
        for rows in chosen.rows:
            for kind, cells in _measure(kernels, peak, rows, chosen).items():
                table.add_row(name, str(rows), kind, *cells)
    console().print(table)


def find_peak(name: str, *, has_tiles: bool, rounds: int) -> Peak:
    """The most that one core does with these instructions: the best of `rounds` measurements."""
    library = load_kernel(SOURCE, (*compiler_flags(name), f"-I{SOURCES}"))
    assert library is not None
    numbers, out = np.ones(READ_BYTES // 4, np.float32), np.zeros(256, np.float32)
    tile_values = narrow(np.random.default_rng(0).standard_normal(TILE_VALUES, np.float32))
    for call in (library.multiply_and_add, library.multiply_and_add_pairs):
        call.restype, call.argtypes = ctypes.c_double, [ctypes.c_long, ctypes.c_float, ctypes.c_float, ctypes.c_void_p]
    library.multiply_tiles.restype = ctypes.c_double
    library.multiply_tiles.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    library.read_numbers.restype = ctypes.c_double
    library.read_numbers.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p]
    calls: list[Callable[[], float]] = [
        partial(library.multiply_and_add, ROUNDS, 1e-6, 1e-6, out.ctypes.data),
        partial(library.multiply_and_add_pairs, ROUNDS, 1e-6, 1e-6, out.ctypes.data),
        partial(library.multiply_tiles, TILE_ROUNDS * has_tiles, tile_values.ctypes.data, out.ctypes.data),
        partial(library.read_numbers, numbers.ctypes.data, len(numbers), out.ctypes.data),
    ]
    return Peak(*(max(_rate(call) for _ in range(rounds)) for call in calls))


def _rate(call: Callable[[], float]) -> float:
    """What a call counts, per second."""
    begin = thread_time()
    return call() / (thread_time() - begin)


def _measure(kernels: Kernels, peak: Peak, rows: int, chosen: Namespace) -> dict[str, Sequence[str]]:
    """The cells of each kind of weights for one number of rows; the contestants take turns."""
    values = np.random.default_rng(0)
    stored = narrow(values.standard_normal((chosen.outputs, chosen.inputs), np.float32))
    x = round_to_bfloat16(values.standard_normal((rows, chosen.inputs), np.float32))
    matrices = {"bfloat16": _matrices(kernels, stored), "float32": _matrices(kernels, widen(stored))}
    if peak.tile_flops:
        matrices["tiles"] = _matrices(kernels, stored, tiled=True)
    calls = {kind: _calls(kernels, x, of, chosen.outputs) for kind, of in matrices.items()}
    plain = [widen(stored).T.copy() for _ in range(len(matrices["float32"]))]
    calls["NumPy"] = [partial(np.matmul, x, matrix) for matrix in plain]
    seconds = {name: _best_seconds(calls, name, chosen.rounds) for name in calls}
    flops = 2 * rows * chosen.inputs * chosen.outputs
    cells: dict[str, Sequence[str]] = {}
    for kind, of in matrices.items():
        read = of[0].packed.nbytes / seconds[kind]
        cells[kind] = (
            f"{flops / seconds[kind] / 1e9:.0f}",
            f"{flops / seconds[kind] / peak.of(kind):.2f}",
            f"{read / 1e9:.1f}",
            f"{read / peak.bytes:.2f}",
            f"{flops / seconds['NumPy'] / 1e9:.0f}",
            f"{seconds['NumPy'] / seconds[kind]:.2f}",
        )
    return cells


def _matrices(kernels: Kernels, stored: Any, *, tiled: bool = False) -> list[PanelMatrix]:
    return [
        kernels.pack([stored], transposed=False, tiled=tiled) for _ in range(max(1, MATRICES_BYTES // stored.nbytes))
    ]


def _calls(
    kernels: Kernels, x: Float32Array, matrices: Sequence[PanelMatrix], outputs: int
) -> list[Callable[[], object]]:
    out = np.empty((len(x), outputs), np.float32)
    return [
        partial(kernels.multiply, x, [MatrixProduct(matrix, len(x))], out, narrow=is_narrow, rounded=is_narrow)
        for matrix, is_narrow in ((matrix, matrix.weights != FLOAT32) for matrix in matrices)
    ]


def _best_seconds(calls: dict[str, list[Callable[[], object]]], name: str, rounds: int) -> float:
    """The least seconds of a call, over rounds of calls with each matrix in turn."""
    taken = []
    for _ in range(rounds):
        begin = thread_time()
        for call in calls[name]:
            call()
        taken.append((thread_time() - begin) / len(calls[name]))
    return min(taken)
