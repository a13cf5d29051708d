"""Where the ranks run, and the times of exchanges between them."""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI

from moempi.backend.select import count_gpus, find_island, make_backend
from moempi.comm.device_memory import takes_device_memory
from moempi.comm.peer_trial import mapping_problem
from moempi.comm.select_transport import candidates, exchange_s, make_transport
from moempi.comm.transports.cuda_ipc import CudaIpc
from moempi.config.job import ExchangeSection, RunSection, TopologySection
from moempi.layout.topology import Topology
from moempi.runtime.world import World

SIZES_BYTES = (0, 256, 4096, 65536, 1048576)
ROUNDS = 20
WIDTH = 7168
ROWS = (1, 73)
"""Rows between each pair of ranks: in bfloat16 14 KB, and about 1 MB."""


@dataclass(frozen=True, slots=True)
class RankLocation:
    """The host of a rank, the cores that it may use, and its domain in the node ("" if unknown)."""

    rank: int
    host: str
    cores: str
    domain: str


@dataclass(frozen=True, slots=True)
class Timing:
    """One Alltoallv of `num_bytes` for each pair of ranks: best and median seconds of the slowest rank."""

    num_bytes: int
    best_s: float
    median_s: float


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of `probe`.

    `library` is the first line of the MPI library's version, `thread_level` the level that it provides, at most
    `max_thread_level`. `locations` are in the rank order of `topology`. `transports` are the median seconds of an
    exchange on the slowest rank, for each transport and each of ROWS.
    """

    library: str
    thread_level: int
    max_thread_level: int
    topology: Topology
    locations: Sequence[RankLocation]
    timings: Sequence[Timing]
    transports: Mapping[str, Sequence[float]]


def probe(world: World) -> ProbeResult:
    """Locate the ranks and time exchanges between them; the same result on all ranks. Collective, blocks."""
    domain = find_island(world.local_rank, on_gpu=True)
    topology, ranks = world.by_node(TopologySection(), domain=domain)
    result = ProbeResult(
        library=MPI.Get_library_version().splitlines()[0].rstrip("\0"),
        thread_level=MPI.Query_thread(),
        max_thread_level=MPI.THREAD_MULTIPLE,
        topology=topology,
        locations=ranks.allgather(RankLocation(world.rank, world.host, _cores(), domain)),
        transports=_time_transports(world, topology, ranks),
        timings=[time_exchange(world.comm, num_bytes, rounds=ROUNDS) for num_bytes in SIZES_BYTES],
    )
    ranks.Free()
    return result


def time_exchange(comm: MPI.Intracomm, num_bytes: int, *, rounds: int) -> Timing:
    """Time `rounds` blocking Alltoallv of `num_bytes` for each pair of ranks; collective, blocks."""
    outgoing = np.zeros(comm.size * num_bytes, np.uint8)
    incoming = np.empty_like(outgoing)
    counts = [num_bytes] * comm.size
    taken = []
    for _ in range(rounds + 2):  # the first two open the connections
        comm.Barrier()
        begin = MPI.Wtime()
        comm.Alltoallv([outgoing, counts], [incoming, counts])
        taken.append(MPI.Wtime() - begin)
    slowest = np.array(taken[2:])
    comm.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
    return Timing(num_bytes, float(slowest.min()), statistics.median(slowest.tolist()))


def _time_transports(world: World, topology: Topology, ranks: MPI.Intracomm) -> dict[str, list[float]]:
    """Median seconds of an exchange on the slowest rank, for each transport and each of ROWS; collective, blocks.

    The rows are in comm buffers of the backend that a run would select: the CUDA backend if there is a GPU.
    """
    device_buffers = takes_device_memory(ExchangeSection(), world, has_gpu=count_gpus(RunSection()) > 0)
    backend = make_backend(RunSection(), local_rank=world.local_rank, device_buffers=device_buffers)
    row_bytes = WIDTH * backend.row_dtype.itemsize
    taken = {}
    one_node = len(set(topology.nodes)) == 1
    uses_ipc = one_node and not mapping_problem(ranks, topology, backend)
    for name in (*candidates(backend), *([CudaIpc.name] if uses_ipc else [])):
        slot_bytes = max(ROWS) * row_bytes * world.size
        transport = make_transport(name, ranks, backend, width=WIDTH, nodes=topology.nodes, slot_bytes=slot_bytes)
        seconds = [exchange_s(transport, ranks, rows=rows) for rows in ROWS]
        transport.free()
        taken[name] = [float(ranks.allreduce(own_s, MPI.MAX)) for own_s in seconds]
    return taken


def _cores() -> str:
    """The cores that this process may use, as ranges: "0-3,8"."""
    cores = sorted(os.sched_getaffinity(0))
    runs: list[list[int]] = []
    for core in cores:
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
