"""Which transport: the one that the job names, or the fastest of a short probe at the start."""

import logging
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
from mpi4py import MPI

from moempi.backend.protocol import Array, Backend
from moempi.comm.transports.alltoallv import Alltoallv
from moempi.comm.transports.base import Transport
from moempi.comm.transports.pairwise import Pairwise
from moempi.comm.transports.shared import Shared, SlotOptions
from moempi.layout.grid import Grid
from moempi.layout.topology import Topology

NAMES = (Alltoallv.name, Pairwise.name, Shared.name)
PROBED_BYTES = 64 << 10
ROUNDS = 9


@dataclass(frozen=True, slots=True)
class ChosenTransport:
    """The name of a transport, and why it was taken, for a person."""

    name: str
    reason: str


def choose_transport(
    name: str, comm: MPI.Intracomm, grid: Grid, backend: Backend, *, topology: Topology, width: int
) -> ChosenTransport:
    """The job's transport, or for "auto" the fastest for rows of `width`; logged.

    Collective over all ranks of `comm`, which stand as `topology` says; a probe blocks for some milliseconds.
    """
    choice = ChosenTransport(name, "as the job says")
    if name == "auto":
        coords = grid.coordinates(comm.rank)
        stage, own = MPI.Intracomm(comm.Split(coords.stage, comm.rank)), grid.stages[coords.stage].ranks
        choice = fastest(comm, stage, backend, width=width, nodes=topology.subset(own).nodes)
        stage.Free()
    logging.getLogger(__name__).info("transport %s: %s", choice.name, choice.reason)
    return choice


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
    """A transport for rows of the backend between the ranks of `comm`, whose node is nodes[rank]; collective.

    `room_bytes` is the most that a rank should be able to send at once through shared memory, where there will be as
    many `windows` as this transport's.
    """
    row_bytes, allocate = width * backend.row_dtype.itemsize, partial(backend.comm_buffer, width=width)
    if name == Shared.name:
        slots = SlotOptions(
            num_bytes=slot_bytes,
            windows=windows,
            in_place=backend.record_event() is None,
            register=backend.register_host_memory,
        )
        return Shared(comm, row_bytes=row_bytes, nodes=nodes, slots=slots, allocate=allocate)
    return (Alltoallv if name == Alltoallv.name else Pairwise)(comm, row_bytes=row_bytes, allocate=allocate)


def fastest(
    comm: MPI.Intracomm, group: MPI.Intracomm, backend: Backend, *, width: int, nodes: tuple[int, ...]
) -> ChosenTransport:
    """The transport that exchanges one row, and PROBED_BYTES a pair, soonest on the slowest rank; collective, blocks.

    Rows are exchanged within each `group`, whose ranks' nodes are `nodes`; all ranks of `comm` get the same answer.
    Where only GPUs address wires, ranks share no room, so "shared" is no candidate.
    """
    names = candidates(backend)
    taken = dict.fromkeys(names, 0.0)
    row_bytes = width * backend.row_dtype.itemsize
    for rows in (1, max(1, PROBED_BYTES // row_bytes)):
        for name in names:
            room_bytes = rows * row_bytes * group.size
            transport = make_transport(name, group.Dup(), backend, width=width, nodes=nodes, slot_bytes=room_bytes)
            taken[name] += exchange_s(transport, group, backend.comm_buffer(rows * group.size, width), rows=rows)
    slowest = np.array(list(taken.values()))
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    ranking = sorted(zip(slowest.tolist(), names, strict=True))
    return ChosenTransport(ranking[0][1], ", ".join(f"{name} {seconds * 1e6:.0f} us" for seconds, name in ranking))


def candidates(backend: Backend) -> list[str]:
    """The transports that can carry the backend's rows."""
    return [name for name in NAMES if backend.comm_buffers_on_host or name != Shared.name]


def exchange_s(transport: Transport, group: MPI.Intracomm, incoming: Array, *, rows: int) -> float:
    """Median seconds, on this rank, in which each pair of ranks exchanges so many rows; collective, blocks."""
    counts = np.full(group.size, rows)
    taken = []
    for _ in range(ROUNDS):
        outgoing = transport.outgoing(len(incoming))
        group.Barrier()
        begin = MPI.Wtime()
        landing = transport.start(outgoing, counts, incoming, counts)
        landing.Wait()
        landing.release()
        taken.append(MPI.Wtime() - begin)
    return median(taken)
