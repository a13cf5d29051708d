"""`moempi bench immediate`: time that a step saves if experts send their outputs directly to the next stage."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from statistics import median

import numpy as np

from moempi.arrays import Float32Array
from moempi.backend.select import make_backend
from moempi.bench.measure import alternate, machine, ratio
from moempi.bench.random_layer import Sizes, add_size_flags, make_layer, make_rows, run_to_end
from moempi.comm.addends import Addends
from moempi.comm.batch import NONE, Batch
from moempi.comm.lane_comm import make_lane_comm, slot_rows
from moempi.comm.rank_groups import RankGroups
from moempi.comm.row_shape import RowShape
from moempi.comm.transfers import PendingTransfers, Transfers
from moempi.comm.transport_factory import TransportFactory
from moempi.commands.flags import MAX_COUNT, count, whole_number
from moempi.config.job import ParallelSection, RunSection
from moempi.errors import UsageError
from moempi.layout.grid import Grid, make_grid
from moempi.layout.layout import Layout
from moempi.layout.placement import linear
from moempi.layout.row_split import RowSplit
from moempi.layout.topology import Topology
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World

HOMES, IMMEDIATE = "over the homes", "immediate"
"""The two routes of the outputs: combined on the token's home rank and sent on, or sent directly."""


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    add_size_flags(parser)
    what = "rows of a rank in a step (1 8 64)"
    parser.add_argument(
        "--tokens", type=whole_number(0, MAX_COUNT), nargs="+", default=[1, 8, 64], metavar="T", help=what
    )
    parser.add_argument("--rounds", type=count, default=51, help="measurements of each (51)")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective. Raises RuntimeError if immediate routing changes a result."""
    world.collectively(lambda: _check_usage(world.size))
    sizes = Sizes.of(chosen)
    table = figures_table(
        *("rows", f"{HOMES} us", f"{IMMEDIATE} us", "saved us", f"{HOMES} / {IMMEDIATE}"),
        title=f"From a MoE layer into the next stage, 2 stages of {world.size // 2} ranks, bfloat16",
        caption=machine(world),
    )
    grid = make_grid(ParallelSection(stages=2), layer_costs=[1, 1], nodes=world.nodes, slots_per_group=1)
    for tokens in chosen.tokens:
        steps = {
            HOMES: _make_step(world, grid, sizes, tokens, immediate_stages=()),
            IMMEDIATE: _make_step(world, grid, sizes, tokens, immediate_stages=(0,)),
        }
        if (steps[HOMES]() != steps[IMMEDIATE]()).any():
            raise RuntimeError("immediate routing changed a result")
        taken = alternate(world, steps, rounds=chosen.rounds)
        homes_us, immediate_us = (median(taken[name]) * 1e6 for name in (HOMES, IMMEDIATE))
        figures = (homes_us, immediate_us, homes_us - immediate_us)
        gain = ratio(taken[HOMES], taken[IMMEDIATE])
        table.add_row(str(tokens), *(f"{figure:.0f}" for figure in figures), f"{gain:.2f}")
    if world.rank == 0:
        console().print(table)


def _check_usage(num_ranks: int) -> None:
    if num_ranks % 2:
        raise UsageError(f"bench immediate measures between two stages, {num_ranks} ranks do not form two equal ones")


def _make_step(
    world: World, grid: Grid, sizes: Sizes, tokens: int, *, immediate_stages: tuple[int, ...]
) -> Callable[[], Float32Array]:
    """A function that computes a layer on the first stage and sends its rows; on the second it returns them.

    On the first stage it returns its input rows. Both calls are collective.
    """
    pending = PendingTransfers()
    run = RunSection(backend="numpy", precision="bfloat16")
    backend = make_backend(run, local_rank=world.local_rank, device_buffers=False, progress=pending.progress)
    placement = linear(sizes.num_experts, world.size // 2)
    shape = RowShape(sizes.width, top_k=sizes.top_k, group_rows=tokens)
    transports = TransportFactory(
        backend=backend, name="alltoallv", shape=shape, slot_rows=slot_rows(shape, grid, world.rank)
    )
    comm = make_lane_comm(
        RankGroups.make(world.comm, grid),
        Layout(grid, ({0: placement}, {0: placement}), memory=(), immediate_stages=immediate_stages),
        Topology(world.nodes),
        transports=transports,
        transfers=Transfers(backend, pending),
    )
    coords = grid.coordinates(world.rank)
    if coords.stage:
        return lambda: comm.link.start_receive().finish().rows
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
        prompts=np.array([tokens]),
    )

    def send() -> Float32Array:
        combine = comm.last_combine(batch, RowSplit((tokens,), 1))
        outputs, _ = run_to_end(layer.forward(backend, rows, comm.exchange, combine, addends=Addends(None, rows)))
        if comm.immediate is None:
            comm.link.send(batch, outputs)
        return rows

    return send
