"""`moempi bench overlap`: the communication that interleaved lanes hide, in layers over an emulated link.

With `--backend cupy` the lanes compute on a GPU; `compute` is then the time of the kernels alone, without the host's
other work. One rank is enough there: the rows that it sends to itself stay in device memory and take the link's time.
With a flag of the layout, whole runs are measured instead of layers alone.
"""

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import numpy as np

from moempi.arrays import narrow
from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.protocol import Backend
from moempi.backend.select import make_backend
from moempi.backend.values import Array
from moempi.bench.device_calls import around_calls, record_calls, replay
from moempi.bench.gpu_clock import Timer
from moempi.bench.gpu_report import write_json
from moempi.bench.layout_overlap import (
    BLOCKING,
    COMPUTING,
    OVERLAPPED,
    add_layout_flags,
    has_layout,
    measure_layout,
    overlap_figures,
    overlap_table,
)
from moempi.bench.measure import alternate, machine
from moempi.bench.random_layer import Sizes, add_size_flags, make_exchange, make_layer, make_rows, random_bits
from moempi.bench.random_values import RandomValues, random_layer, random_matrix
from moempi.bench.timeline import Timeline
from moempi.comm.combine import HomeCombine
from moempi.comm.exchange import OneHop
from moempi.comm.hop import Hop
from moempi.comm.select_transport import NAMES, make_transport
from moempi.comm.transfers import PendingTransfers, Transfers, Waits
from moempi.comm.transports.base import Transport
from moempi.comm.transports.cuda_ipc import CudaIpc
from moempi.comm.transports.emulated import EmulatedLinks, Link
from moempi.commands.flags import amount, count
from moempi.config.job import RunSection
from moempi.engine.interleave import interleave
from moempi.errors import UsageError
from moempi.layout.placement import linear
from moempi.layout.schedule import EXCHANGE_PHASES, Point
from moempi.layout.topology import NODE, SELF, Topology
from moempi.model.feed_forward import MixtureOfExperts
from moempi.observe.console import console
from moempi.runtime.world import World

LATENCY_S = 20e-6
LABEL_WIDTH = 18
POINTS = tuple(Point(0, phase) for phase in EXCHANGE_PHASES)


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    add_size_flags(parser)
    add = parser.add_argument
    add("--backend", choices=("numpy", "cupy"), default="numpy", help="where the lanes compute (numpy)")
    add("--lanes", type=count, nargs="+", default=[2], metavar="N", help="lanes of a rank (2)")
    add("--tokens", type=count, default=256, metavar="T", help="rows of a lane on a rank (256)")
    add("--layers", type=count, default=4, help="layers that a lane goes through (4)")
    add("--passes", type=count, default=5, help="measurements of all layers, overlap on and off (5)")
    add("--link", type=amount, nargs="+", default=[0.9], metavar="X", help="link seconds per second of compute (0.9)")
    add("--transport", choices=NAMES, default="alltoallv", help="carries the rows between ranks (alltoallv)")
    add_layout_flags(parser)
    add("--json", type=Path, metavar="FILE", help="also write all figures to FILE, as a list")


@dataclass(frozen=True, slots=True)
class Stack:
    """The weights of all layers, on a backend which advances the `pending` transfers of all lanes.

    `projections` map D to 3D and D to D. `timer` is the GPU's, None on a CPU.
    """

    backend: Backend
    pending: PendingTransfers
    projections: tuple[Any, Any]
    experts: MixtureOfExperts
    timer: Timer | None = None

    def synchronize(self, num_lanes: int) -> None:
        """Block until the queues of all lanes are idle."""
        for lane in range(num_lanes):
            with self.backend.on_queue(lane):
                event = self.backend.record_event()
            if event is not None:
                event.synchronize()


@dataclass(frozen=True, slots=True)
class Rig:
    """Lanes of a rank, each with its own rows and communicator, which share one emulated link."""

    stack: Stack
    exchanges: Sequence[OneHop]
    rows: Sequence[Array]
    num_layers: int
    timeline: Timeline
    overlap: bool

    def pass_through(self) -> list[Array]:
        """Compute all layers for the rows of all lanes, and return the outputs of each lane; collective, blocks."""
        outputs = list(self.rows)
        self._interleave(outputs, self.stack.backend.on_queue)
        self.stack.synchronize(len(self.rows))
        return outputs

    def watch(self) -> Timeline:
        """Compute all layers once more, and return the timeline of the lanes; collective, blocks."""
        backend, timer = self.stack.backend, self.stack.timer
        if timer is None or not isinstance(backend, CudaBackend):
            self.timeline.clear()
            self._interleave(list(self.rows), self._span)
            return self.timeline
        zero = timer.record_event()
        timer.synchronize()
        begin, spans = perf_counter(), []
        self.timeline.clear()

        def around(_: str, method: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any, **options: Any) -> None:
                first = timer.record_event()
                method(*arguments, **options)
                spans.append((backend.queue, first, timer.record_event()))

            return call

        with around_calls(backend, around):
            self.pass_through()
        for lane, first, last in spans:
            self.timeline.add_computing(lane, begin + timer.seconds(zero, first), begin + timer.seconds(zero, last))
        return self.timeline

    def _interleave(self, outputs: list[Array], on_queue: Callable[[int], Any]) -> None:
        lanes = [self._lane(outputs, lane) for lane in range(len(self.rows))]
        interleave(lanes, POINTS, pending=self.stack.pending, overlap=self.overlap, on_queue=on_queue)

    @contextmanager
    def _span(self, lane: int) -> Iterator[None]:
        """Record the time in which a lane computes."""
        begin = perf_counter()
        yield
        self.timeline.add_computing(lane, begin, perf_counter())

    def _lane(self, outputs: list[Array], lane: int) -> Waits[None]:
        into, out = self.stack.projections
        backend, width = self.stack.backend, outputs[lane].shape[1]
        for _ in range(self.num_layers):
            projected = backend.linear(outputs[lane], into)[:, :width]
            if not isinstance(backend, CudaBackend):  # whose products take strided rows
                projected = np.ascontiguousarray(projected)
            x = backend.linear(projected, out)
            exchange = self.exchanges[lane]
            outputs[lane], _ = yield from self.stack.experts.forward(backend, x, exchange, HomeCombine(exchange))


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective. Raises UsageError on one rank with NumPy, ConfigError without the required GPU.

    A layer is two projections (D to 3D, D to D) and the experts. Its compute time is measured first, over a link
    without cost. Then the link gets the bandwidth at which communication takes its share of the compute time.
    """
    if world.size == 1 and chosen.backend == "numpy":
        raise UsageError("bench overlap measures between ranks; start it on 2 or more, or use --backend cupy")
    if has_layout(chosen) and chosen.backend != "numpy":
        raise UsageError("bench overlap measures whole runs with NumPy only; leave out --backend, or the layout")
    if chosen.transport == CudaIpc.name and chosen.backend == "numpy":
        raise UsageError(f"--transport {CudaIpc.name} reads GPU memory; add --backend cupy")
    records: list[Mapping[str, Any]] = []
    for record in measure_layout(world, chosen) if has_layout(chosen) else measure_layers(world, chosen):
        records.append(record)
        if world.rank == 0 and chosen.json is not None:
            write_json(chosen.json, records)


def measure_layers(world: World, chosen: Namespace) -> Iterator[Mapping[str, Any]]:
    """Measure layers alone with each number of lanes; collective."""
    pending = PendingTransfers()
    backend = world.collectively(lambda: _backend(world, chosen.backend, pending))
    timer: Timer | None = None
    if isinstance(backend, CudaBackend):
        from moempi.bench.gpu_timer import CudaTimer

        timer = CudaTimer()
    stack = make_stack(backend, pending, Sizes.of(chosen), hosted=_hosted(world, chosen), timer=timer)
    for num_lanes in chosen.lanes:
        yield from measure(world, stack, chosen, num_lanes=num_lanes)


def _backend(world: World, name: Literal["numpy", "cupy"], pending: PendingTransfers) -> Backend:
    """With several ranks, rows pass through memory of the host, unless the transport is "cuda_ipc"."""
    run = RunSection(backend=name, precision="bfloat16")
    return make_backend(
        run,
        local_rank=world.local_rank,
        device_buffers=world.size == 1,
        progress=pending.progress,
    )


def _hosted(world: World, chosen: Namespace) -> tuple[int, ...]:
    return linear(chosen.experts, world.size).hosted[world.rank]


def make_stack(
    backend: Backend, pending: PendingTransfers, sizes: Sizes, *, hosted: tuple[int, ...], timer: Timer | None = None
) -> Stack:
    """The weights on the rank that hosts these experts; on a GPU the device makes them."""
    width = sizes.width
    if isinstance(backend, CudaBackend):
        values = RandomValues(backend.device)
        into, out = (random_matrix(values, columns, width) for columns in (3 * width, width))
        return Stack(backend, pending, (into, out), random_layer(values, sizes, num_hosted=len(hosted)), timer)
    into, out = (backend.matrix(random_bits((columns, width), key=columns)) for columns in (3 * width, width))
    return Stack(backend, pending, (into, out), make_layer(sizes, backend, hosted=hosted), timer)


def measure(world: World, stack: Stack, chosen: Namespace, *, num_lanes: int) -> Iterator[Mapping[str, Any]]:
    """Measure and print each share of the link, and yield its figures; collective.

    Raises RuntimeError if overlap changes a result on a CPU; cuBLAS promises equal bits for a single queue only.
    """
    free, slow = Link(0.0, math.inf), Link(LATENCY_S, math.inf)
    make = partial(make_rig, world, stack, chosen, num_lanes=num_lanes)
    blocking, overlapped = make(slow, overlap=False), make(slow, overlap=True)
    passes = {
        COMPUTING: _computing(stack, make(free, overlap=False)),
        BLOCKING: blocking.pass_through,
        OVERLAPPED: overlapped.pass_through,
    }
    first = median(alternate(world, {COMPUTING: passes[COMPUTING]}, rounds=chosen.passes)[COMPUTING])
    num_bytes = _link_bytes(world, slow, blocking.pass_through)
    for share in chosen.link:
        slow.bytes_per_s = num_bytes / (share * first)
        same = _same_bits(world, stack.backend, blocking.pass_through(), overlapped.pass_through())
        if not same and stack.timer is None:
            raise RuntimeError("overlap changed a result")
        taken = alternate(world, passes, rounds=chosen.passes)
        timeline = overlapped.watch()
        record = _record(world, chosen, taken, link_s=share * first, num_lanes=num_lanes)
        record |= {"same_bits": same, "hidden": timeline.hidden(), "link": share}
        if world.rank == 0:
            _print(world, record, timeline)
        yield record


def _computing(stack: Stack, rig: Rig) -> Callable[[], object]:
    """What takes the compute time: all layers over a link without cost, or on a GPU their kernels, one by one."""
    backend = stack.backend
    if not isinstance(backend, CudaBackend):
        return rig.pass_through
    rig.pass_through()
    calls = record_calls(backend, rig.pass_through)

    def kernels() -> None:
        replay(calls)
        stack.synchronize(1)

    return kernels


def make_rig(world: World, stack: Stack, chosen: Namespace, link: Link, *, num_lanes: int, overlap: bool) -> Rig:
    """A rig with lanes over `link`; its rows are the same in every call. Collective."""
    backend, timeline = stack.backend, Timeline(num_lanes)
    width, placement = chosen.width, linear(chosen.experts, world.size)
    transfers = Transfers(backend, stack.pending)
    row_bytes = width * backend.row_dtype.itemsize
    levels = Topology((0,) * world.size).levels(world.rank)
    exchanges = []
    for lane in range(num_lanes):
        comm = world.comm.Dup()
        transport = EmulatedLinks(
            _transport(comm, backend, chosen),
            {SELF if world.size == 1 else NODE: link},
            levels=levels,
            row_bytes=row_bytes,
            on_transfer=partial(timeline.add_transfer, lane),
        )
        exchanges.append(make_exchange(Hop(comm, backend, transfers=transfers, transport=transport), placement))
    rows = [
        backend.tensor(narrow(make_rows(chosen.tokens, width, seed=world.rank * num_lanes + lane)))
        for lane in range(num_lanes)
    ]
    stack.synchronize(1)
    return Rig(stack, exchanges, rows, chosen.layers, timeline, overlap)


def _transport(comm: Any, backend: Backend, chosen: Namespace) -> Transport:
    return make_transport(
        chosen.transport,
        comm,
        backend,
        width=chosen.width,
        nodes=(0,) * comm.size,
        slot_bytes=2 * chosen.tokens * chosen.top_k * chosen.width * backend.row_dtype.itemsize,
        windows=3 * max(chosen.lanes),
    )


def _link_bytes(world: World, link: Link, transfer: Callable[[], object]) -> float:
    """Bytes on the busiest rank's link in one pass; collective."""
    link.bytes_per_s, link.busy_s = 1e12, 0.0
    transfer()
    return float(max(world.comm.allgather(link.busy_s * link.bytes_per_s)))


def _same_bits(world: World, backend: Backend, one: list[Array], other: list[Array]) -> bool:
    """Whether the outputs of all lanes on all ranks are equal; collective, blocks."""
    pairs = zip(one, other, strict=True)
    same = all(bool((backend.download(first) == backend.download(second)).all()) for first, second in pairs)
    return all(world.comm.allgather(same))


def _record(
    world: World, chosen: Namespace, taken: dict[str, list[float]], *, link_s: float, num_lanes: int
) -> dict[str, Any]:
    return {
        "part": "overlap",
        "backend": chosen.backend,
        "ranks": world.size,
        "lanes": num_lanes,
        "tokens": chosen.tokens,
        **overlap_figures(taken, link_s=link_s),
    }


def _print(world: World, record: Mapping[str, Any], timeline: Timeline) -> None:
    bits = "same bits" if record["same_bits"] else "other bits"
    title = f"{record['lanes']} lanes over an emulated link, {world.size} ranks, {record['backend']}, bfloat16, "
    title += f"{bits} with overlap on and off"
    console().print(overlap_table(record, title=title, caption=machine(world)))
    for line in timeline.lines(width=console().width - LABEL_WIDTH):
        console().print(line)
    console().print(f"While rows are on the link, a lane of this rank computes {record['hidden']:.0%} of the time.")
