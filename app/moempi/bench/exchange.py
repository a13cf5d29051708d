"""`moempi bench exchange`: every transport of rows on the host, MPI's blocking Alltoallv, and torch's gloo."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np

from moempi.arrays import aligned_empty
from moempi.bench import peers
from moempi.bench.measure import alternate, machine, ratio
from moempi.comm.transports.alltoallv import Alltoallv
from moempi.comm.transports.base import Transport, start_transfer, wait
from moempi.comm.transports.pairwise import Pairwise
from moempi.comm.transports.shared import Shared
from moempi.commands.flags import count
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World

ROW_BYTES = 14336
BUFFERS = 2
"""Buffers that a transport uses alternately."""
IN_A_ROW = 116
"""Number of exchanges in a measurement: dispatch and combine of 58 MoE layers."""
BLOCKING, GLOO = "MPI Alltoallv", "torch gloo"


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    what = f"rows of {ROW_BYTES:,} bytes from each rank to each (1 5 18 73)"
    parser.add_argument("--rows", type=count, nargs="+", default=[1, 5, 18, 73], metavar="N", help=what)
    parser.add_argument("--rounds", type=count, default=101, help="measurements of each exchange (101)")


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective."""
    table = figures_table(
        *("bytes per pair", "transport", "us", "Alltoallv us", "gloo us", "Alltoallv / ours", "gloo / ours"),
        title=f"An exchange between {world.size} ranks, of {IN_A_ROW} in a row",
        caption=machine(world),
    )
    gloo = peers.start_gloo(world)
    made = [make(world.comm, row_bytes=ROW_BYTES) for make in (Alltoallv, Pairwise, Shared)]
    transport_by_name: dict[str, Transport] = {transport.name: transport for transport in made}
    for num_rows in chosen.rows:
        for row in _measure(world, transport_by_name, num_rows, gloo, rounds=chosen.rounds):
            table.add_row(*row)
    peers.stop_gloo(gloo)
    if world.rank == 0:
        console().print(table)


def _measure(
    world: World, transport_by_name: Mapping[str, Transport], num_rows: int, gloo: Any, *, rounds: int
) -> list[list[str]]:
    """The cells of one table row for each transport; collective."""
    comm, counts = world.comm, np.full(world.size, num_rows)
    outgoing, incoming = (aligned_empty((world.size * num_rows, ROW_BYTES), np.uint8) for _ in range(2))
    outgoing[:] = world.rank
    for transport in transport_by_name.values():
        _check(world, transport, counts, incoming)
    contestants: dict[str, Callable[[], object]] = {
        name: partial(_exchange, transport, counts, incoming) for name, transport in transport_by_name.items()
    }
    sizes = counts * ROW_BYTES
    contestants[BLOCKING] = partial(comm.Alltoallv, [outgoing, sizes], [incoming, sizes])
    if gloo is not None:
        contestants[GLOO] = peers.gloo_exchange(gloo, outgoing, incoming)
    repeated = {name: partial(_repeat, exchange) for name, exchange in contestants.items()}
    taken = alternate(world, repeated, rounds=rounds)
    return [
        [
            f"{num_rows * ROW_BYTES:,}",
            name,
            *(_us(taken[column]) if column in taken else "" for column in (name, BLOCKING, GLOO)),
            *(f"{ratio(taken[other], taken[name]):.2f}" if other in taken else "" for other in (BLOCKING, GLOO)),
        ]
        for name in transport_by_name
    ]


def _repeat(exchange: Callable[[], object]) -> None:
    for _ in range(IN_A_ROW):
        exchange()


def _exchange(transport: Transport, counts: Any, incoming: Any) -> None:
    outgoing = transport.outgoing(len(incoming))
    receipt = start_transfer(transport, outgoing, counts, incoming, counts)
    wait(receipt)
    receipt.release()


def _check(world: World, transport: Transport, counts: Any, incoming: Any) -> None:
    """Send each rank's number with every buffer of a transport; raises RuntimeError if another arrives; collective."""
    sources = np.repeat(np.arange(world.size) % 256, counts)
    for _ in range(BUFFERS):
        outgoing = transport.outgoing(len(incoming))
        outgoing[:] = world.rank % 256
        receipt = start_transfer(transport, outgoing, counts, incoming, counts)
        wait(receipt)
        rows, index = receipt.rows()
        if ((rows[: len(sources)] if index is None else rows[index]) != sources[:, None]).any():
            raise RuntimeError(f"transport {transport.name} delivered wrong rows")
        receipt.release()


def _us(taken: list[float]) -> str:
    return f"{median(taken) / IN_A_ROW * 1e6:.1f}"
