"""Sums and gathers over the ranks that leave little on any rank but the first.

`comm` is a communicator, its first rank is the root. All functions are collective and block.
"""

from typing import Any, TypeVar

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

PIECE_BYTES = 64 << 20
"""Bytes that arrive at the root at a time."""

Numbers = TypeVar("Numbers", bound=NDArray[Any])


def sum_on_all(comm: MPI.Intracomm, own: Numbers) -> Numbers:
    """The sum of arrays of one shape, on every rank."""
    total: Numbers = np.empty_like(own)
    comm.Allreduce(own, total, MPI.SUM)
    return total


def sum_on_root(comm: MPI.Intracomm, own: Numbers) -> Numbers:
    """The sum of arrays of one shape, on the root; zeros on the other ranks."""
    total: Numbers = np.zeros_like(own)
    addends = np.ascontiguousarray(own).reshape(-1)
    step = max(1, PIECE_BYTES // own.itemsize)
    for start in range(0, addends.size, step):
        piece = addends[start : start + step]
        comm.Reduce(piece, total.reshape(-1)[start : start + step] if comm.rank == 0 else None, MPI.SUM)
    return total


def gather_on_root(comm: MPI.Intracomm, own: bytes) -> list[bytes]:
    """The bytes of each rank in rank order, on the root; nothing on the other ranks.

    They arrive in rounds, in each of which all ranks together send PIECE_BYTES at most.
    """
    longest = np.empty(1, np.int64)
    comm.Allreduce(np.array([len(own)], np.int64), longest, MPI.MAX)
    lengths = np.empty(comm.size, np.int64) if comm.rank == 0 else None
    comm.Gather(np.array([len(own)], np.int64), lengths)
    step, sent = max(1, PIECE_BYTES // comm.size), np.frombuffer(own, np.uint8)
    gathered: list[list[bytes]] = [[] for _ in range(comm.size)] if comm.rank == 0 else []
    for start in range(0, int(longest[0]), step):
        piece = sent[start : start + step]
        if lengths is None:
            comm.Gatherv(piece, None)
            continue
        counts = np.clip(lengths - start, 0, step)
        pieces = np.empty(int(counts.sum()), np.uint8)
        comm.Gatherv(piece, [pieces, counts, MPI.BYTE])
        for of_rank, end, count in zip(gathered, np.cumsum(counts).tolist(), counts.tolist(), strict=True):
            of_rank.append(pieces[end - count : end].tobytes())
    return [b"".join(of_rank) for of_rank in gathered]
