"""Whether the ranks of each node can map each other's GPU memory."""

import numpy as np
from mpi4py import MPI

from moempi.backend.protocol import Backend, PeerMemory, RowCopy
from moempi.errors import ConfigError
from moempi.layout.topology import Topology

ROWS, WIDTH = 3, 256


def mapping_problem(comm: MPI.Intracomm, topology: Topology, backend: Backend) -> str:
    """Why a rank of `comm` cannot read the GPU memory of a rank of its node; "" if all can, the same on all ranks.

    `topology` is that of `comm`. Collective, blocks.
    """
    if comm.allreduce(backend.peer_memory is None, MPI.LOR):
        return "not every rank has a GPU"
    node = MPI.Intracomm(comm.Split(topology.nodes[comm.rank], comm.rank))
    shared = node.Split_type(MPI.COMM_TYPE_SHARED)
    is_hidden = shared.size < node.size
    shared.Free()
    if comm.allreduce(is_hidden, MPI.LOR):
        problem = "MPI does not share memory between all ranks of a node"
    else:
        problem = comm.allreduce(_read_node(node, backend), MPI.MAX)
    node.Free()
    return problem


def _read_node(node: MPI.Intracomm, backend: Backend) -> str:
    """The problem of this rank, if any. Each rank writes its number plus 1, then reads the numbers of all others."""
    memory, handle, problem = backend.peer_memory, b"", ""
    assert memory is not None
    try:
        own = memory.allocate(ROWS, WIDTH)
        handle = memory.handle(own)
        numbers = backend.tensor(np.full((ROWS, WIDTH), 1 + node.rank, backend.row_dtype))
        backend.finish_loading()
        memory.copy([RowCopy(numbers, 0, 0, ROWS)], own).synchronize()
    except ConfigError as error:
        problem = str(error)
    for rank, other in enumerate(node.allgather(handle)):
        if other and handle and rank != node.rank:
            problem = problem or _read(memory, other, backend, expected=1 + rank)
    node.Barrier()  # no rank frees what another has mapped
    return problem


def _read(memory: PeerMemory, handle: bytes, backend: Backend, *, expected: int) -> str:
    try:
        mapped = memory.map(handle, ROWS, WIDTH)
    except ConfigError as error:
        return str(error)
    read = memory.allocate(ROWS, WIDTH)
    memory.copy([RowCopy(mapped, 0, 0, ROWS)], read).synchronize()
    memory.unmap(mapped)
    return "" if (backend.download(read) == expected).all() else "the GPU memory of another rank reads as other values"
