"""Which transport: the one that the job names, or the fastest of a short probe at the start."""

from dataclasses import dataclass
from statistics import median

import numpy as np
from mpi4py import MPI

from moempi.arrays import aligned_rows
from moempi.parallel.transports.alltoallv import Alltoallv
from moempi.parallel.transports.pairwise import Pairwise
from moempi.parallel.transports.shared import Shared
from moempi.parallel.transports.transfer import Transport

NAMES = (Alltoallv.name, Pairwise.name, Shared.name)
PROBED_BYTES = 64 << 10
ROUNDS = 9


@dataclass(frozen=True, slots=True)
class ChosenTransport:
    """The name of a transport, and why it was taken, for a person."""

    name: str
    reason: str


def make_transport(
    name: str, comm: MPI.Intracomm, *, row_bytes: int, nodes: tuple[int, ...], room_bytes: int
) -> Transport:
    """A transport between the ranks of `comm`, whose node is nodes[rank]; collective.

    `room_bytes` is the most that a rank should be able to send at once through shared memory.
    """
    if name == Shared.name:
        return Shared(comm, row_bytes=row_bytes, nodes=nodes, room_bytes=room_bytes)
    return (Alltoallv if name == Alltoallv.name else Pairwise)(comm, row_bytes=row_bytes)


def fastest(comm: MPI.Intracomm, group: MPI.Intracomm, *, row_bytes: int, nodes: tuple[int, ...]) -> ChosenTransport:
    """The transport that exchanges one row, and PROBED_BYTES a pair, soonest on the slowest rank; collective, blocks.

    Rows are exchanged within each `group`, whose ranks' nodes are `nodes`; all ranks of `comm` get the same answer.
    """
    taken = dict.fromkeys(NAMES, 0.0)
    for rows in (1, max(1, PROBED_BYTES // row_bytes)):
        for name in NAMES:
            room_bytes = rows * row_bytes * group.size
            transport = make_transport(name, group.Dup(), row_bytes=row_bytes, nodes=nodes, room_bytes=room_bytes)
            taken[name] += _seconds(transport, group, rows=rows, row_bytes=row_bytes)
    slowest = np.array(list(taken.values()))
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    ranking = sorted(zip(slowest.tolist(), NAMES, strict=True))
    return ChosenTransport(ranking[0][1], ", ".join(f"{name} {seconds * 1e6:.0f} us" for seconds, name in ranking))


def _seconds(transport: Transport, group: MPI.Intracomm, *, rows: int, row_bytes: int) -> float:
    counts = np.full(group.size, rows)
    incoming = aligned_rows(rows * group.size, row_bytes=row_bytes)
    taken = []
    for _ in range(ROUNDS):
        outgoing = transport.outgoing(len(incoming))
        group.Barrier()
        begin = MPI.Wtime()
        transport.start(outgoing, counts, incoming, counts).Wait()
        taken.append(MPI.Wtime() - begin)
    return median(taken)
