"""`moempi bench gpu`: the parts of a layer on one GPU, and the GPU's own copy and cuBLAS in the same run.

The default sizes are of a layer with width 7,168. Every figure is the median over rounds in which the contestants run
alternately, each many times in a row. If torch can use the GPU, its expert is measured as well.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter

import numpy as np
from rich.table import Table

from moempi.backend.cuda.backend import CudaBackend, Matrix
from moempi.backend.protocol import Array, Expert, Segment
from moempi.backend.select import make_backend
from moempi.bench import peers
from moempi.bench.measure import machine
from moempi.bench.random_layer import random_bits
from moempi.commands.flags import count
from moempi.config.job import RunSection
from moempi.config.tensors import PAGE_ROWS
from moempi.errors import ConfigError
from moempi.observe.console import console
from moempi.runtime.world import World

Run = Callable[[], object]
SLOTS = 8
"""Outputs that are combined into one row."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table: a part of a layer, its work, median seconds, rate, and a comparison."""

    name: str
    work: str
    seconds: float
    rate: str
    comparison: str


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    parser.add_argument("--width", type=count, default=7168, metavar="D", help="width of a row (7168)")
    parser.add_argument(
        "--expert-width", type=count, default=2048, metavar="F", help="hidden width of an expert (2048)"
    )
    parser.add_argument("--heads", type=count, default=128, help="attention heads (128)")
    parser.add_argument("--head-dim", type=count, default=128, help="numbers of a head (128)")
    parser.add_argument("--context", type=count, default=4096, help="positions of a sequence (4096)")
    parser.add_argument("--few", type=count, nargs="+", default=[1, 16, 64], metavar="M", help="rows of small experts")
    parser.add_argument("--many", type=count, nargs="+", default=[1024, 4096, 16384], metavar="M", help="of large ones")
    parser.add_argument("--sequences", type=count, default=32, help="sequences that decode at once (32)")
    parser.add_argument("--rounds", type=count, default=9, help="measurements of each contestant (9)")
    parser.add_argument("--repeats", type=count, default=20, help="submissions of a measurement (20)")


def run(world: World, chosen: Namespace) -> None:
    """Measure on the GPU of rank 0 and print; collective. Raises ConfigError without a GPU."""
    backend = world.collectively(lambda: _backend(world))
    figures = measure(backend, chosen) if world.rank == 0 else []
    world.comm.Barrier()
    if world.rank == 0:
        table = Table(*("measure", "work", "us", "rate", "beside"), title=backend.device.name, caption=machine(world))
        for figure in figures:
            table.add_row(figure.name, figure.work, f"{figure.seconds * 1e6:.1f}", figure.rate, figure.comparison)
        console().print(table)


def _backend(world: World) -> CudaBackend:
    run = RunSection(backend="cupy")
    backend = make_backend(run, local_rank=world.local_rank, device_buffers=True)
    if not isinstance(backend, CudaBackend):
        raise ConfigError("bench gpu needs a GPU")
    return backend


def measure(backend: CudaBackend, sizes: Namespace) -> list[Figure]:
    """All figures of one GPU."""
    clock = _Clock(backend, rounds=sizes.rounds, repeats=sizes.repeats)
    return [*_experts(clock, sizes), *_packing(clock, sizes), _decode(clock, sizes), _prefill(clock, sizes)]


@dataclass(frozen=True, slots=True)
class _Clock:
    """Times contestants alternately; a measurement is `repeats` submissions and one wait for the GPU."""

    backend: CudaBackend
    rounds: int
    repeats: int

    def seconds(self, *contestants: Run) -> list[float]:
        """The median seconds of one submission of each contestant; blocks."""
        taken: list[list[float]] = [[] for _ in contestants]
        for _ in range(self.rounds + 1):
            for times, contestant in zip(taken, contestants, strict=True):
                self.backend.record_event().synchronize()
                begin = perf_counter()
                for _ in range(self.repeats):
                    contestant()
                self.backend.record_event().synchronize()
                times.append((perf_counter() - begin) / self.repeats)
        return [median(times[1:]) for times in taken]

    def rows(self, *shape: int) -> Array:
        """Random bfloat16 values of this shape on the GPU."""
        count = int(np.prod(shape))
        return self.backend.device.upload(random_bits((1, count), key=count).reshape(shape))


def _experts(clock: _Clock, sizes: Namespace) -> list[Figure]:
    """An expert, compared with its two matrix products alone and with torch."""
    backend, width, hidden = clock.backend, sizes.width, sizes.expert_width
    bits = random_bits((2 * hidden, width), key=1), random_bits((width, hidden), key=2)
    gate_up, down = (backend.matrix(part) for part in bits)
    expert, figures = Expert(gate_up, down), []
    for num_rows in (*sizes.few, *sizes.many):
        x, counts = clock.rows(num_rows, width), np.array([num_rows])
        hidden_rows, outputs = clock.rows(num_rows, 2 * hidden), clock.rows(num_rows, width)

        def products(x: Array = x, hidden_rows: Array = hidden_rows, outputs: Array = outputs) -> None:
            for rows, matrix, out in ((x, gate_up, hidden_rows), (hidden_rows[:, :hidden], down, outputs)):
                assert isinstance(matrix, Matrix)
                backend.device.product(rows, matrix.values, out, transposed=matrix.transposed)

        torch_expert = peers.gpu_expert(*bits, num_rows)
        contestants = [lambda x=x, counts=counts: backend.expert_mlp(x, [expert], counts), products]
        ours, cublas, *torch = clock.seconds(*contestants, *([torch_expert] if torch_expert else []))
        rate = 6 * num_rows * width * hidden / ours / 1e12
        comparison = f"{cublas / ours:.2f} of its products alone" + "".join(f", torch x {t / ours:.2f}" for t in torch)
        figures.append(Figure("expert", f"{num_rows:,} rows", ours, f"{rate:.1f} TFLOP/s", comparison))
    return figures


def _packing(clock: _Clock, sizes: Namespace) -> list[Figure]:
    """Packing rows, and combining SLOTS outputs per row, compared with the device's copy by their bytes per second."""
    backend = clock.backend
    num_rows = max(sizes.many)
    x, buffer, copied = (clock.rows(num_rows, sizes.width) for _ in range(3))
    order = backend.upload(np.random.default_rng(0).permutation(num_rows))
    output_rows = backend.upload(np.random.default_rng(1).integers(0, num_rows, (num_rows // SLOTS, SLOTS)))
    weights = backend.upload(np.full((num_rows // SLOTS, SLOTS), 1 / SLOTS, np.float32))
    pack, combine, copy = clock.seconds(
        lambda: backend.pack(x, order, buffer),
        lambda: backend.combine(buffer, output_rows, weights),
        lambda: backend.device.copy(x, copied),
    )
    pack_bytes = 2 * num_rows * sizes.width * 2
    combine_bytes = num_rows * sizes.width * 2 * (1 + 1 / SLOTS)
    return [
        Figure("pack", f"{num_rows:,} rows", pack, _rate(pack_bytes, pack), f"{copy / pack:.2f} of the copy rate"),
        Figure(
            "combine",
            f"{num_rows // SLOTS:,} rows of {SLOTS}",
            combine,
            _rate(combine_bytes, combine),
            f"{combine_bytes / combine / (pack_bytes / copy):.2f} of the copy rate",
        ),
    ]


def _decode(clock: _Clock, sizes: Namespace) -> Figure:
    """Attention of one new row per sequence to its whole context, compared with the device's copy rate."""
    backend, pages = clock.backend, -(-sizes.context // PAGE_ROWS)
    segments = [
        Segment(number, 1, sizes.context - 1, np.arange(number * pages, (number + 1) * pages))
        for number in range(sizes.sequences)
    ]
    cache = backend.cache(sizes.sequences * pages, sizes.heads, sizes.head_dim)
    queries = clock.rows(sizes.sequences, sizes.heads, sizes.head_dim)
    copied = clock.rows(*cache.keys.shape)
    attend, copy = clock.seconds(
        lambda: backend.attend(queries, cache, segments, scale=sizes.head_dim**-0.5),
        lambda: backend.device.copy(cache.keys, copied),
    )
    num_bytes = sizes.sequences * sizes.context * sizes.heads * sizes.head_dim * 4
    comparison = f"{num_bytes / attend / (2 * copied.nbytes / copy):.2f} of the copy rate"
    work = f"{sizes.sequences} sequences of {sizes.context:,}"
    return Figure("decode attention", work, attend, _rate(num_bytes, attend), comparison)


def _prefill(clock: _Clock, sizes: Namespace) -> Figure:
    """Causal attention of all rows of one sequence, which has half the products of full attention."""
    backend, pages = clock.backend, -(-sizes.context // PAGE_ROWS)
    segments = [Segment(0, sizes.context, 0, np.arange(pages))]
    cache = backend.cache(pages, sizes.heads, sizes.head_dim)
    queries = clock.rows(sizes.context, sizes.heads, sizes.head_dim)
    (attend,) = clock.seconds(lambda: backend.attend(queries, cache, segments, scale=sizes.head_dim**-0.5))
    flops = 2 * sizes.context**2 * sizes.heads * sizes.head_dim
    return Figure("prefill attention", f"{sizes.context:,} rows", attend, f"{flops / attend / 1e12:.1f} TFLOP/s", "")


def _rate(num_bytes: float, seconds: float) -> str:
    return f"{num_bytes / seconds / 1e9:,.1f} GB/s"
