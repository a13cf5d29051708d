"""`moempi bench product`: the product kernel of the CPU on one core, beside what the core can do at most, and NumPy.

The most is measured by loops of fused multiply-adds on registers and by reading memory, for the same instructions.
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
    BFLOAT16,
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
ROUNDS = 2_000_000
READ_BYTES = 512 << 20
"""More than any cache holds."""
MATRICES_BYTES = 256 << 20
"""Matrices are multiplied in turn, so that a row finds none of its weights in a cache."""


class Peak(NamedTuple):
    """What a core can do at most: operations per second in float32 and with bfloat16 pairs, and bytes read."""

    flops: float
    pair_flops: float
    bytes: float


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
        kernels, peak = load_kernels(name), find_peak(name, rounds=chosen.rounds)
        assert kernels is not None
        for rows in chosen.rows:
            for kind, cells in _measure(kernels, peak, rows, chosen).items():
                table.add_row(name, str(rows), kind, *cells)
    console().print(table)


def find_peak(name: str, *, rounds: int) -> Peak:
    """The most that one core does with these instructions: the best of `rounds` measurements."""
    library = load_kernel(SOURCE, (*compiler_flags(name), f"-I{SOURCES}"))
    assert library is not None
    numbers, out = np.ones(READ_BYTES // 4, np.float32), np.zeros(64, np.float32)
    best = [0.0, 0.0, 0.0]
    for _ in range(rounds):
        for i, call in enumerate((library.multiply_and_add, library.multiply_and_add_pairs)):
            call.restype, call.argtypes = (
                ctypes.c_double,
                [ctypes.c_long, ctypes.c_float, ctypes.c_float, ctypes.c_void_p],
            )
            begin = thread_time()
            flops = call(ROUNDS, 1e-6, 1e-6, out.ctypes.data)
            best[i] = max(best[i], flops / (thread_time() - begin))
        begin = thread_time()
        library.read_numbers(
            ctypes.c_void_p(numbers.ctypes.data), ctypes.c_long(len(numbers)), ctypes.c_void_p(out.ctypes.data)
        )
        best[2] = max(best[2], READ_BYTES / (thread_time() - begin))
    return Peak(*best)


def _measure(kernels: Kernels, peak: Peak, rows: int, chosen: Namespace) -> dict[str, Sequence[str]]:
    """The cells of each kind of weights for one number of rows; the contestants take turns."""
    values = np.random.default_rng(0)
    stored = narrow(values.standard_normal((chosen.outputs, chosen.inputs), np.float32))
    x = round_to_bfloat16(values.standard_normal((rows, chosen.inputs), np.float32))
    matrices = {"bfloat16": _matrices(kernels, stored), "float32": _matrices(kernels, widen(stored))}
    calls = {kind: _calls(kernels, x, of, chosen.outputs) for kind, of in matrices.items()}
    plain = [widen(stored).T.copy() for _ in range(len(matrices["float32"]))]
    calls["NumPy"] = [partial(np.matmul, x, matrix) for matrix in plain]
    seconds = {name: _best_seconds(calls, name, chosen.rounds) for name in calls}
    flops = 2 * rows * chosen.inputs * chosen.outputs
    cells: dict[str, Sequence[str]] = {}
    for kind, of in matrices.items():
        most = peak.flops if kind == "float32" else max(peak.flops, peak.pair_flops)
        read = of[0].packed.nbytes / seconds[kind]
        cells[kind] = (
            f"{flops / seconds[kind] / 1e9:.0f}",
            f"{flops / seconds[kind] / most:.2f}",
            f"{read / 1e9:.1f}",
            f"{read / peak.bytes:.2f}",
            f"{flops / seconds['NumPy'] / 1e9:.0f}",
            f"{seconds['NumPy'] / seconds[kind]:.2f}",
        )
    return cells


def _matrices(kernels: Kernels, stored: Any) -> list[PanelMatrix]:
    return [kernels.pack([stored], transposed=False) for _ in range(max(1, MATRICES_BYTES // stored.nbytes))]


def _calls(
    kernels: Kernels, x: Float32Array, matrices: Sequence[PanelMatrix], outputs: int
) -> list[Callable[[], object]]:
    out = np.empty((len(x), outputs), np.float32)
    return [
        partial(kernels.multiply, x, [MatrixProduct(matrix, len(x))], out, narrow=is_narrow, rounded=is_narrow)
        for matrix, is_narrow in ((matrix, matrix.weights == BFLOAT16) for matrix in matrices)
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
