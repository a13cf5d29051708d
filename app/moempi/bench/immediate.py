"""`moempi bench immediate`: what a step gains when a stage's last experts answer straight to the next stage."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import median

import numpy as np
from rich.table import Table

from moempi.arrays import Float32Array
from moempi.backend.cpu.backend import NumpyBackend
from moempi.bench.layers import Sizes, add_size_flags, finish, make_layer, make_rows
from moempi.bench.measure import alternate, machine, ratio
from moempi.comm.batch import NONE, Batch
from moempi.comm.lane_comm import make_lane_comm, slot_rows
from moempi.comm.row_shape import RowShape
from moempi.comm.transfers import PendingTransfers, Transfers
from moempi.comm.transport_factory import TransportFactory
from moempi.commands.flags import MAX_COUNT, count, whole_number
from moempi.config.job import ParallelSection
from moempi.errors import UsageError
from moempi.layout.grid import Grid, make_grid
from moempi.layout.layout import Layout
from moempi.layout.placement import linear
from moempi.layout.row_split import RowSplit
from moempi.layout.topology import Topology
from moempi.observe.console import console
from moempi.runtime.world import World

HOMES, IMMEDIATE = "over the homes", "immediate"


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    add_size_flags(parser)
    what = "rows of a rank in a step (1 8 64)"
    parser.add_argument(
        "--tokens", type=whole_number(0, MAX_COUNT), nargs="+", default=[1, 8, 64], metavar="T", help=what
    )
    parser.add_argument("--rounds", type=count, default=51, help="measurements of each (51)")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective. Raises RuntimeError when immediate routing changes a result."""
    world.collectively(lambda: _refuse_odd(world.size))
    sizes = Sizes.of(chosen)
    table = Table(
        *("rows", f"{HOMES} us", f"{IMMEDIATE} us", "saved us", f"{HOMES} / {IMMEDIATE}"),
        title=f"From a MoE layer into the next stage, 2 stages of {world.size // 2} ranks, bfloat16",
        caption=machine(world),
    )
    grid = make_grid(ParallelSection(stages=2), layer_costs=[1, 1], nodes=world.nodes, slots_per_group=1)
    for tokens in chosen.tokens:
        ways = {
            HOMES: _way(world, grid, sizes, tokens, immediate_stages=()),
            IMMEDIATE: _way(world, grid, sizes, tokens, immediate_stages=(0,)),
        }
        if (ways[HOMES]() != ways[IMMEDIATE]()).any():
            raise RuntimeError("immediate routing changed a result")
        taken = alternate(world, ways, rounds=chosen.rounds)
        spans = [median(taken[name]) * 1e6 for name in (HOMES, IMMEDIATE)]
        gain = ratio(taken[HOMES], taken[IMMEDIATE])
        table.add_row(str(tokens), *(f"{span:.0f}" for span in (*spans, spans[0] - spans[1])), f"{gain:.2f}")
    if world.rank == 0:
        console().print(table)


def _refuse_odd(num_ranks: int) -> None:
    if num_ranks % 2:
        raise UsageError(f"bench immediate measures between two stages, {num_ranks} ranks do not form two equal ones")


def _way(
    world: World, grid: Grid, sizes: Sizes, tokens: int, *, immediate_stages: tuple[int, ...]
) -> Callable[[], Float32Array]:
    """What takes rows through a layer of the first stage and into the second, and returns what arrived there."""
    pending = PendingTransfers()
    backend = NumpyBackend(precision="bfloat16", reproducible=False, progress=pending.progress)
    placement = linear(sizes.num_experts, world.size // 2)
    shape = RowShape(sizes.width, top_k=sizes.top_k, group_rows=tokens)
    transports = TransportFactory(
        backend=backend, name="alltoallv", shape=shape, slot_rows=slot_rows(shape, grid, world.rank)
    )
    comm = make_lane_comm(
        world.comm,
        Layout(grid, ({0: placement}, {0: placement}), memory=(), immediate_stages=immediate_stages),
        Topology(world.nodes),
        transports=transports,
        transfers=Transfers(backend, pending, overlap=True),
    )
    coords = grid.coordinates(world.rank)
    if coords.stage:
        return lambda: comm.link.receive(comm.link.post_receives())[2]
    layer = make_layer(sizes, backend, hosted=placement.hosted[world.rank])
    rows = make_rows(tokens, sizes.width, seed=world.rank)
    batch = Batch(
        tokens=NONE,
        requests=np.array([0]),
        slots=np.array([grid.slots(0, coords.data).start]),
        starts=np.array([0]),
        lengths=np.array([tokens]),
        capacities=np.array([tokens]),
        logit_rows=NONE,
        freed=NONE,
    )

    def send() -> Float32Array:
        combine = comm.last_combine(batch, RowSplit((tokens,), 1))
        passed = finish(layer.forward(backend, rows, comm.exchange, combine, residual=rows))
        if comm.immediate is None:
            comm.link.send(batch, passed)
        return rows

    return send
