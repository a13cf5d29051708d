"""Selects the transport: the one in the job, or the fastest in a short probe at the start."""

import logging
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
from mpi4py import MPI

from moempi.backend.protocol import Array, Backend
from moempi.comm.transports.alltoallv import Alltoallv
from moempi.comm.transports.base import Transport, wait
from moempi.comm.transports.pairwise import Pairwise
from moempi.comm.transports.shared import Shared, SlotOptions
from moempi.layout.grid import Grid
from moempi.layout.topology import Topology

NAMES = (Alltoallv.name, Pairwise.name, Shared.name)
PROBED_BYTES = 64 << 10
ROUNDS = 9


@dataclass(frozen=True, slots=True)
class ChosenTransport:
    """The name of a transport, and the reason for the choice, for the user."""

    name: str
    reason: str


def choose_transport(
    name: str, comm: MPI.Intracomm, grid: Grid, backend: Backend, *, topology: Topology, width: int
) -> ChosenTransport:
    """The job's transport, or for "auto" the fastest for rows of `width`; logged.

    Collective over the ranks of `comm`, whose topology is `topology`. A probe blocks for some milliseconds.
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
    """A transport for rows of the backend between the ranks of `comm` on `nodes` (R,); collective.

    "shared" uses slots of `slot_bytes`: a rank that sends more at once uses messages. `windows` is the number of such
    transports in the run, which share the memory of the node.
    """
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
    return (Alltoallv if name == Alltoallv.name else Pairwise)(comm, row_bytes=row_bytes, allocate=allocate)


def fastest(
    comm: MPI.Intracomm, group: MPI.Intracomm, backend: Backend, *, width: int, nodes: tuple[int, ...]
) -> ChosenTransport:
    """The transport with the shortest time on the slowest rank to exchange one row, then PROBED_BYTES, per pair.

    Rows are exchanged between the ranks of `group`, on `nodes` (G,). All ranks of `comm` get the same result.
    Collective over `comm`, blocks.
    """
    names = candidates(backend)
    taken = dict.fromkeys(names, 0.0)
    row_bytes = width * backend.row_dtype.itemsize
    for rows in (1, max(1, PROBED_BYTES // row_bytes)):
        for name in names:
            slot_bytes = rows * row_bytes * group.size
            transport = make_transport(name, group, backend, width=width, nodes=nodes, slot_bytes=slot_bytes)
            taken[name] += exchange_s(transport, group, backend.comm_buffer(rows * group.size, width), rows=rows)
            transport.free()
    slowest = np.array(list(taken.values()))
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    ranking = sorted(zip(slowest.tolist(), names, strict=True))
    return ChosenTransport(ranking[0][1], ", ".join(f"{name} {seconds * 1e6:.0f} us" for seconds, name in ranking))


def candidates(backend: Backend) -> list[str]:
    """The transports that can send the backend's rows: "shared" needs buffers on the host."""
    return [name for name in NAMES if backend.comm_buffers_on_host or name != Shared.name]


def exchange_s(transport: Transport, group: MPI.Intracomm, incoming: Array, *, rows: int) -> float:
    """Median seconds on this rank to exchange `rows` rows between each pair of ranks; collective, blocks."""
    counts = np.full(group.size, rows)
    taken = []
    for _ in range(ROUNDS):
        outgoing = transport.outgoing(len(incoming))
        group.Barrier()
        begin = MPI.Wtime()
        receipt = transport.start(outgoing, counts, incoming, counts)
        wait(receipt)
        receipt.release()
        taken.append(MPI.Wtime() - begin)
    return median(taken)
