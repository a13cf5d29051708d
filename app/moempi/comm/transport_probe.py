"""`moempi check`: which MPI, which ranks where, and how fast rows travel between them."""

import os
import statistics
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from rich.console import Group, RenderableType
from rich.table import Table

from moempi.backend.select import describe_gpus, find_gpus, find_island, make_backend
from moempi.comm.device_memory import trial
from moempi.comm.select_transport import candidates, exchange_s, make_transport
from moempi.config.job import RunSection, TopologySection
from moempi.layout.topology import Topology
from moempi.runtime.world import World

SIZES_BYTES = (0, 256, 4096, 65536, 1048576)
ROUNDS = 20
WIDTH = 7168
ROWS = (1, 73)
"""Rows of bfloat16 between each pair of ranks: 14 KB, and about 1 MB."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One Alltoallv of `num_bytes` from every rank to every rank: seconds of the slowest rank, best and median."""

    num_bytes: int
    best_s: float
    median_s: float


def check(world: World) -> RenderableType | None:
    """Measure the exchange between the ranks; rank 0 gets all findings, the others None; collective, blocks."""
    island = find_island(world.local_rank, on_gpu=True)
    topology, ranks = world.by_node(TopologySection(), island=island)
    places = ranks.gather((world.rank, world.host, _cores(), island))
    transports = _time_transports(world, topology, ranks)
    timings = [time_exchange(world.comm, num_bytes, rounds=ROUNDS) for num_bytes in SIZES_BYTES]
    if places is None:
        return None
    lines = [
        MPI.Get_library_version().splitlines()[0].rstrip("\0"),
        f"{world.size} ranks on {world.num_nodes} nodes, thread level {MPI.Query_thread()} of {MPI.THREAD_MULTIPLE}",
    ]
    lines.extend(_gpu_lines())
    if not world.split_matches_nodes:
        lines.append("MPI finds other shared-memory groups than the host names: the launcher hides neighbours")
    lines.extend(_division_lines(topology))
    tables = _rank_table(topology, places), _exchange_table(timings, world.size)
    return Group(*lines, *tables, _transport_table(transports))


def time_exchange(comm: MPI.Intracomm, num_bytes: int, *, rounds: int) -> Timing:
    """Time `rounds` blocking Alltoallv of `num_bytes` for each pair of ranks; collective, blocks."""
    outward = np.zeros(comm.size * num_bytes, np.uint8)
    inward = np.empty_like(outward)
    counts = [num_bytes] * comm.size
    taken = []
    for _ in range(rounds + 2):  # the first two open the connections
        comm.Barrier()
        begin = MPI.Wtime()
        comm.Alltoallv([outward, counts], [inward, counts])
        taken.append(MPI.Wtime() - begin)
    slowest = np.array(taken[2:])
    comm.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
    return Timing(num_bytes, float(slowest.min()), statistics.median(slowest.tolist()))


def _time_transports(world: World, topology: Topology, ranks: MPI.Intracomm) -> dict[str, list[float]]:
    """Seconds of an exchange over each transport, of the slowest rank, for each of ROWS; collective, blocks.

    Rows lie where a run's would: on a GPU where there is one.
    """
    backend = make_backend(RunSection(), local_rank=world.local_rank, takes_device_memory=trial)
    row_bytes = WIDTH * backend.row_dtype.itemsize
    taken = {}
    for name in candidates(backend):
        room_bytes = max(ROWS) * row_bytes * world.size
        transport = make_transport(name, ranks.Dup(), backend, width=WIDTH, nodes=topology.nodes, slot_bytes=room_bytes)
        seconds = [
            exchange_s(transport, ranks, backend.comm_buffer(rows * world.size, WIDTH), rows=rows) for rows in ROWS
        ]
        taken[name] = [float(ranks.allreduce(one, MPI.MAX)) for one in seconds]
    return taken


def _transport_table(taken: dict[str, list[float]]) -> Table:
    """A row for each transport, and what a job file should say."""
    heads = (f"us, {rows * 2 * WIDTH:,} bytes per pair" for rows in ROWS)
    table = Table("transport", *heads, title="Rows between all ranks (shared does not copy: they are read in place)")
    for name, seconds in taken.items():
        table.add_row(name, *(f"{one * 1e6:.1f}" for one in seconds))
    quickest = min(taken, key=lambda name: sum(taken[name]))
    table.caption = f'job file: exchange.transport = "{quickest}", or "auto", which asks at every start'
    return table


def _gpu_lines() -> list[str]:
    """The GPUs of the first rank's node, whether MPI takes their memory, and what a job file should say."""
    lines = describe_gpus()
    if find_gpus()[0]:
        takes = trial()
        lines.append(f"MPI {'moves' if takes else 'does not move'} rows between buffers in GPU memory")
        lines.append(f'job file: run.backend = "cupy", exchange.buffers = "{"device" if takes else "host"}"')
    return lines


def _division_lines(topology: Topology) -> list[str]:
    """What of the levels between a rank and all others could be told apart."""
    divisions = {"islands inside nodes": topology.islands, "switches above them": topology.switches}
    return [f"{name}: {len(set(numbers)) if numbers else 'not told apart'}" for name, numbers in divisions.items()]


def _cores() -> str:
    cores = sorted(os.sched_getaffinity(0))
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _rank_table(topology: Topology, ranks: list[tuple[int, str, str, str]]) -> Table:
    """A row for each rank, in the order in which the ranks are counted."""
    table = Table("rank", "switch", "node", "host", "cores", "near")
    for seat, (rank, host, cores, island) in enumerate(ranks):
        switch = str(topology.switches[seat]) if topology.switches else ""
        table.add_row(str(rank), switch, str(topology.nodes[seat]), host, cores, island)
    return table


def _exchange_table(timings: list[Timing], size: int) -> Table:
    table = Table("bytes per pair", "best us", "median us", "GB/s per rank", title="Alltoallv between all ranks")
    for timing in timings:
        rate = timing.num_bytes * size / timing.best_s / 1e9
        table.add_row(
            f"{timing.num_bytes:,}", f"{timing.best_s * 1e6:.1f}", f"{timing.median_s * 1e6:.1f}", f"{rate:.2f}"
        )
    return table
