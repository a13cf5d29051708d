"""Selects the transport: the one in the job, or the fastest in a short probe at the start."""

import logging
from collections.abc import Sequence
from functools import partial
from statistics import median

import numpy as np
from mpi4py import MPI
from msgspec import Struct

from moempi.backend.protocol import Backend
from moempi.comm.peer_trial import mapping_problem
from moempi.comm.rank_groups import RankGroups
from moempi.comm.transports.alltoallv import Alltoallv
from moempi.comm.transports.base import Transport, wait
from moempi.comm.transports.cuda_ipc import CudaIpc
from moempi.comm.transports.loopback import Loopback
from moempi.comm.transports.pairwise import Pairwise
from moempi.comm.transports.shared import Shared, SlotOptions
from moempi.config.job import ExchangeSection
from moempi.errors import ConfigError
from moempi.layout.grid import Grid
from moempi.layout.row_buffers import ipc_obstacle
from moempi.layout.topology import Topology

NAMES = (Alltoallv.name, Pairwise.name, Shared.name, CudaIpc.name)
INSIDE_NODES = (Shared.name, CudaIpc.name)
"""The transports that send no messages inside a node."""
PROBED_BYTES, MOST_BYTES = 64 << 10, 1 << 20
"""Bytes that a rank sends to each rank in the probe, and at most to all: its memory must not grow with the ranks."""
ROUNDS = 5


class ChosenTransport(Struct, frozen=True):
    """The name of a transport, and the reason for the choice, for the user."""

    name: str
    reason: str


def choose_transport(
    section: ExchangeSection,
    groups: RankGroups,
    grid: Grid,
    backend: Backend,
    *,
    topology: Topology,
    width: int,
    has_peer_memory: bool = True,
) -> ChosenTransport:
    """The job's transport; for "auto" "cuda_ipc" where it can be used, else the stage's fastest for rows of `width`.

    `has_peer_memory` is whether every rank may have peer memory. Logs the choice.
    With "cuda_ipc" rows never leave the memory of GPUs. Collective over all ranks, whose topology is `topology`. A
    probe blocks for some milliseconds. Raises ConfigError, on all ranks, if the job requires "cuda_ipc" and it cannot
    be used.
    """
    log, choice = logging.getLogger(__name__), ChosenTransport(section.transport, "as the job says")
    is_alone = all(len(stage.ranks) == 1 for stage in grid.stages)
    if is_alone and section.transport != CudaIpc.name:
        choice = ChosenTransport(Loopback.name, "each stage has one rank")
    elif section.transport in ("auto", CudaIpc.name):
        stage_nodes = [tuple(topology.nodes[rank] for rank in stage.ranks) for stage in grid.stages]
        problem = "not every rank has a GPU"
        if has_peer_memory:
            problem = _ipc_problem(section, groups.ranks, backend, topology=topology, stage_nodes=stage_nodes)
        if section.transport == CudaIpc.name and problem:
            raise ConfigError(f'exchange.transport = "{CudaIpc.name}": {problem}; use "auto"')
        if problem and backend.peer_memory is not None:
            log.info("transport %s is not used: %s", CudaIpc.name, problem)
        if section.transport == "auto" and not problem:
            choice = ChosenTransport(CudaIpc.name, "the ranks of each node read each other's GPU memory")
        elif section.transport == "auto":
            nodes = stage_nodes[grid.coordinates(groups.ranks.rank).stage]
            choice = fastest(groups.stage, groups.stage, backend, width=width, nodes=nodes)
    log.info("transport %s: %s", choice.name, choice.reason)
    return choice


def _ipc_problem(
    section: ExchangeSection,
    comm: MPI.Intracomm,
    backend: Backend,
    *,
    topology: Topology,
    stage_nodes: Sequence[tuple[int, ...]],
) -> str:
    """Why "cuda_ipc" cannot be used, or ""; the same on all ranks. Collective, blocks."""
    return ipc_obstacle(section, stage_nodes) or mapping_problem(comm, topology, backend)


def make_transport(
    name: str,
    comm: MPI.Intracomm,
    backend: Backend,
    *,
    width: int,
    nodes: tuple[int, ...],
    slot_bytes: int,
    windows: int = 1,
) -> Transport:
    """A transport for rows of the backend between the ranks of `comm` on `nodes` (R,); collective.

    "shared" uses slots of `slot_bytes`: a rank that sends more at once uses messages. `windows` is the number of such
    transports in the run, which share the memory of the node. "cuda_ipc" needs all ranks on one node; its slots have
    `slot_bytes` at least. A rank alone gets "loopback".
    """
    if comm.size == 1:
        return Loopback(partial(backend.row_buffer, width=width))
    row_bytes, allocate = width * backend.row_dtype.itemsize, partial(backend.comm_buffer, width=width)
    if name == Shared.name:
        slots = SlotOptions(
            num_bytes=slot_bytes,
            windows=windows,
            in_place=backend.record_event() is None,
            register=backend.register_host_memory,
            unregister=backend.unregister_host_memory,
        )
        return Shared(comm, row_bytes=row_bytes, nodes=nodes, slots=slots, allocate=allocate)
    if name == CudaIpc.name:
        assert backend.peer_memory is not None
        return CudaIpc(comm, backend.peer_memory, width=width, least_rows=slot_bytes // row_bytes)
    return (Alltoallv if name == Alltoallv.name else Pairwise)(comm, row_bytes=row_bytes, allocate=allocate)


def fastest(
    comm: MPI.Intracomm, group: MPI.Intracomm, backend: Backend, *, width: int, nodes: tuple[int, ...]
) -> ChosenTransport:
    """The transport with the shortest time on the slowest rank to exchange one row, then PROBED_BYTES, per pair.

    The second exchange is smaller if a rank would send more than MOST_BYTES. Rows are exchanged between the ranks of
    `group`, on `nodes` (G,). All ranks of `comm` get the same result. Collective over `comm`, blocks.
    """
    names = candidates(backend)
    taken = dict.fromkeys(names, 0.0)
    row_bytes = width * backend.row_dtype.itemsize
    for rows in (1, max(1, min(PROBED_BYTES, MOST_BYTES // group.size) // row_bytes)):
        for name in names:
            slot_bytes = rows * row_bytes * group.size
            transport = make_transport(name, group, backend, width=width, nodes=nodes, slot_bytes=slot_bytes)
            taken[name] += exchange_s(transport, group, rows=rows)
            transport.free()
    slowest = np.array(list(taken.values()))
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    ranking = sorted(zip(slowest.tolist(), names, strict=True))
    return ChosenTransport(ranking[0][1], ", ".join(f"{name} {seconds * 1e6:.0f} us" for seconds, name in ranking))


def candidates(backend: Backend) -> list[str]:
    """The transports that can send the backend's comm buffers: "shared" needs them on the host."""
    return [Alltoallv.name, Pairwise.name, *([Shared.name] if backend.comm_buffers_on_host else [])]


def exchange_s(transport: Transport, group: MPI.Intracomm, *, rows: int) -> float:
    """Median seconds on this rank to exchange counts and `rows` rows between each pair of ranks; collective, blocks."""
    counts, received = np.full((2, group.size), rows)
    taken = []
    for _ in range(ROUNDS):
        outgoing, incoming = (buffer(int(counts.sum())) for buffer in (transport.outgoing, transport.incoming))
        group.Barrier()
        begin = MPI.Wtime()
        transport.send(outgoing, counts)
        wait(group.Ialltoall(counts, received))  # as a dispatch exchanges its counts
        receipt = transport.receive(incoming, received)
        wait(receipt)
        receipt.release()
        taken.append(MPI.Wtime() - begin)
    return median(taken)
