"""`moempi bench overlap`: the communication that two interleaved lanes hide, in layers over an emulated link."""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np
from rich.table import Table

from moempi.arrays import Float32Array
from moempi.backend.cpu.backend import Matrix, NumpyBackend
from moempi.bench.measure import alternate, machine, ratio
from moempi.bench.random_layer import Sizes, add_size_flags, make_exchange, make_layer, make_rows, random_bits
from moempi.comm.combine import HomeCombine
from moempi.comm.exchange import OneHop
from moempi.comm.hop import Hop
from moempi.comm.transfers import PendingTransfers, Transfers
from moempi.comm.transports.alltoallv import Alltoallv
from moempi.comm.transports.emulated import EmulatedLinks, Link
from moempi.commands.flags import count
from moempi.engine.interleave import interleave
from moempi.errors import UsageError
from moempi.layout.placement import linear
from moempi.layout.schedule import EXCHANGE_PHASES, Point
from moempi.layout.topology import NODE, Topology
from moempi.model.feed_forward import MixtureOfExperts
from moempi.observe.console import console
from moempi.runtime.world import World

LANES = 2
LATENCY_S = 20e-6
COMMUNICATION = 0.9
"""Seconds on the emulated link per second of compute."""
LABEL_WIDTH = 18
COMPUTING, BLOCKING, OVERLAPPED = "computing", "blocking", "overlapped"
POINTS = tuple(Point(0, phase) for phase in EXCHANGE_PHASES[1])


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    add_size_flags(parser)
    parser.add_argument("--tokens", type=count, default=256, metavar="T", help="rows of a lane on a rank (256)")
    parser.add_argument("--layers", type=count, default=4, help="layers that a lane goes through (4)")
    parser.add_argument("--passes", type=count, default=5, help="measurements of all layers, overlap on and off (5)")


@dataclass(frozen=True, slots=True)
class Rig:
    """Two lanes of a rank, each with its own rows and communicator, which share one emulated link."""

    backend: NumpyBackend
    projections: tuple[Matrix, Matrix]
    experts: MixtureOfExperts
    exchanges: Sequence[OneHop]
    transfers: Transfers
    rows: Sequence[Float32Array]
    num_layers: int
    timeline: "Timeline"

    def pass_through(self) -> list[Float32Array]:
        """Compute all layers for the rows of all lanes, and return the outputs of each lane; collective."""
        outputs = list(self.rows)
        lanes = [self._lane(outputs, lane) for lane in range(LANES)]
        interleave(lanes, POINTS, side_by_side=LANES)
        return outputs

    def watch(self) -> "Timeline":
        """Compute all layers once more, and return the timeline of the lanes; collective."""
        self.timeline.clear()
        lanes = [self._lane(list(self.rows), lane) for lane in range(LANES)]
        interleave(lanes, POINTS, side_by_side=LANES, on_queue=self._span)
        return self.timeline

    @contextmanager
    def _span(self, lane: int) -> Iterator[None]:
        """Record the time in which a lane computes; a lane first waits, which does not count."""
        begin, waited = perf_counter(), sum(self.transfers.waits.values())
        yield
        waited_here = sum(self.transfers.waits.values()) - waited
        self.timeline.add_computing(lane, begin + waited_here, perf_counter())

    def _lane(self, outputs: list[Float32Array], lane: int) -> Generator[Point, None, None]:
        into, out = self.projections
        backend, width = self.backend, outputs[lane].shape[1]
        for _ in range(self.num_layers):
            projected = backend.linear(outputs[lane], into)[:, :width]
            x = backend.linear(np.ascontiguousarray(projected), out)
            exchange = self.exchanges[lane]
            outputs[lane] = yield from self.experts.forward(backend, x, exchange, HomeCombine(exchange, backend))


class Timeline:
    """The intervals in which each lane computed, and in which its rows were on the link."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Remove all intervals; the timeline begins now."""
        self._begin = perf_counter()
        self._computing: list[list[tuple[float, float]]] = [[] for _ in range(LANES)]
        self._travelling: list[list[tuple[float, float]]] = [[] for _ in range(LANES)]

    def add_computing(self, lane: int, begin: float, end: float) -> None:
        """Add an interval in which a lane computed."""
        self._computing[lane].append((begin, end))

    def add_transfer(self, lane: int, start: float, arrival: float) -> None:
        """Add an interval in which rows of a lane were on the link."""
        self._travelling[lane].append((start, arrival))

    def lines(self, *, width: int) -> list[str]:
        """Two lines per lane, with a bar of `width` characters for compute and one for the link."""
        spans = [*self._computing, *self._travelling]
        end = max(last for lane in spans for _, last in lane)
        scale = width / (end - self._begin)

        def line(lane: Sequence[tuple[float, float]], symbol: str) -> str:
            marks = [" "] * width
            for first, last in lane:
                for column in range(round((first - self._begin) * scale), round((last - self._begin) * scale)):
                    marks[min(column, width - 1)] = symbol
            return "".join(marks)

        return [
            f"lane {lane} {what} {line(intervals[lane], mark)}"
            for lane in range(LANES)
            for what, intervals, mark in (("computes ", self._computing, "█"), ("on a link", self._travelling, "─"))
        ]


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective. Raises RuntimeError if overlap changes a result, UsageError on one rank.

    A layer is two projections (D to 3D, D to D) and the experts. Its compute time is measured first, over a link
    without cost. Then the link gets the bandwidth at which communication takes COMMUNICATION of the compute time.
    """
    if world.size == 1:
        raise UsageError("bench overlap measures between ranks; start it on 2 or more")
    free, slow = Link(0.0, math.inf), Link(LATENCY_S, math.inf)
    rigs = {
        name: make_rig(world, Sizes.of(chosen), link, tokens=chosen.tokens, num_layers=chosen.layers, overlap=overlap)
        for name, link, overlap in ((COMPUTING, free, False), (BLOCKING, slow, False), (OVERLAPPED, slow, True))
    }
    passes = {name: rig.pass_through for name, rig in rigs.items()}
    first = median(alternate(world, {COMPUTING: passes[COMPUTING]}, rounds=chosen.passes)[COMPUTING])
    slow.bytes_per_s = _bandwidth(world, slow, passes[BLOCKING], seconds=COMMUNICATION * first)
    if any((one != other).any() for one, other in zip(passes[BLOCKING](), passes[OVERLAPPED](), strict=True)):
        raise RuntimeError("overlap changed a result")
    taken = alternate(world, passes, rounds=chosen.passes)
    timeline = rigs[OVERLAPPED].watch()
    if world.rank == 0:
        console().print(_table(world, taken, link_s=COMMUNICATION * first))
        for line in timeline.lines(width=console().width - LABEL_WIDTH):
            console().print(line, highlight=False)


def make_rig(world: World, sizes: Sizes, link: Link, *, tokens: int, num_layers: int, overlap: bool) -> Rig:
    """A rig with lanes over `link`; its weights and rows are the same in every call. Collective."""
    pending, timeline = PendingTransfers(), Timeline()
    backend = NumpyBackend(precision="bfloat16", reproducible=False, progress=pending.progress)
    placement = linear(sizes.num_experts, world.size)
    transfers = Transfers(backend, pending, overlap=overlap)
    row_bytes = sizes.width * backend.row_dtype.itemsize
    levels = Topology((0,) * world.size).levels(world.rank)
    exchanges = []
    for lane in range(LANES):
        comm = world.comm.Dup()
        transport = EmulatedLinks(
            Alltoallv(comm, row_bytes=row_bytes),
            {NODE: link},
            levels=levels,
            row_bytes=row_bytes,
            on_transfer=partial(timeline.add_transfer, lane),
        )
        exchange = make_exchange(
            Hop(comm, backend, transfers=transfers, transport=transport, width=sizes.width), placement
        )
        exchanges.append(exchange)
    width = sizes.width
    into, out = (backend.matrix(random_bits((columns, width), key=columns)) for columns in (3 * width, width))
    rows = [make_rows(tokens, width, seed=world.rank * LANES + lane) for lane in range(LANES)]
    experts = make_layer(sizes, backend, hosted=placement.hosted[world.rank])
    return Rig(backend, (into, out), experts, exchanges, transfers, rows, num_layers, timeline)


def _bandwidth(world: World, link: Link, transfer: Callable[[], object], *, seconds: float) -> float:
    """Bytes per second at which all transfers of one pass take `seconds`; collective."""
    link.bytes_per_s, link.busy_s = 1e9, 0.0
    transfer()
    busy_s: float = max(world.comm.allgather(link.busy_s))
    return busy_s * link.bytes_per_s / seconds


def _table(world: World, taken: dict[str, list[float]], *, link_s: float) -> Table:
    table = Table(
        *("compute ms", "link ms", "blocking ms", "overlapped ms", "blocking / overlapped", "overlapped / longer"),
        title=f"{LANES} lanes over an emulated link, {world.size} ranks, bfloat16, same bits with overlap on and off",
        caption=machine(world),
    )
    longer = [max(computing_s, link_s) for computing_s in taken[COMPUTING]]
    spans = (median(taken[COMPUTING]), link_s, median(taken[BLOCKING]), median(taken[OVERLAPPED]))
    gains = (ratio(taken[BLOCKING], taken[OVERLAPPED]), ratio(taken[OVERLAPPED], longer))
    table.add_row(*(f"{span * 1e3:.1f}" for span in spans), *(f"{gain:.2f}" for gain in gains))
    return table
