"""`shared`: inside a node rows stay where their sender packed them, and the receivers read them there.

One window of the node holds flags (shared_flags.py) and two slots for each rank, one for even and one for odd transfer
numbers. A sender packs its rows into its slot. It then signals each receiver the transfer's number and the first row.
When all senders have signalled, a receiver knows the slot row of each of its rows and reads the rows there, once.
`release` then flags the number as read, which frees the slot for the transfer after the next. Rows between nodes, and
rows that exceed the slot, go as messages into the receiver's own buffer; the flag says so, and the receiver copies the
other rows beside them.
"""

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from moempi.arrays import ALIGNMENT_BYTES, IntArray, aligned_rows
from moempi.comm.transports.buffers import BufferRing
from moempi.comm.transports.pairwise import TAGS, blocks, copy_rows
from moempi.comm.transports.shared_flags import (
    ALL_IN_SLOTS,
    BY_MESSAGE,
    WAITING,
    SharedFlags,
    flags_bytes,
    make_shared_flags,
)

SHARED_MEMORY = Path("/dev/shm")
SLOT_BYTES = 16 << 20
SHARE_OF_FREE = 4
"""Of the node's shared memory that is free, one part in so many may be taken: what is written beyond it kills."""
MAX_POLLS = 256
"""Polls of the flags between two calls of MPI."""


@dataclass(slots=True)
class SharedReceipt:
    """A transfer under way: `counts` (R,) rows from each rank, which stay in the rooms where that is so for all.

    `requests` are its messages; `overflow` is what this rank sends when that does not fit into its room.
    """

    transport: "Shared"
    number: int
    incoming: Any
    counts: IntArray
    requests: list[MPI.Request]
    overflow: Any = None
    signalled: bool = False
    in_slots: bool = False

    def Test(self) -> bool:  # noqa: N802
        return self._poll(1)

    def Wait(self) -> None:  # noqa: N802
        while not self._poll(MAX_POLLS):
            self.transport.pause()

    def rows(self) -> tuple[Any, IntArray | None]:
        if not self.in_slots:
            return self.incoming, None
        return self.transport.slots, self.transport.flags.rows(self.number, len(self.incoming))

    def release(self) -> None:
        if self.in_slots:
            self.transport.flags.release(self.number)

    def _poll(self, patience: int) -> bool:
        if not self.signalled:
            found = self.transport.flags.poll(self.number, max_polls=patience)
            if found == WAITING:
                return False
            self.signalled = True
            self.in_slots = found == ALL_IN_SLOTS and self.transport.reads_in_place(self.counts)
            if not self.in_slots:
                self.transport.fetch(self)
        return not self.requests or bool(MPI.Request.Testall(self.requests))


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """The shared memory of a `Shared` transport: two slots of `num_bytes` a rank.

    The slots are smaller where `windows` such windows would take too much of the node's shared memory. `register` is
    called with the memory of all slots before it is used. With `in_place` off, receivers copy their rows out of it.
    """

    num_bytes: int = SLOT_BYTES
    windows: int = 1
    in_place: bool = True
    register: Callable[[npt.NDArray[np.uint8]], None] = lambda memory: None


class Shared:
    """Rows through a window of `comm`'s ranks on this node; nodes (R,), if given, say which ranks those are.

    `allocate(rows)` makes the buffers of rows that exceed a slot. Making one is collective.
    """

    name = "shared"

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        row_bytes: int,
        nodes: tuple[int, ...] | None = None,
        slots: SlotOptions = SlotOptions(),
        allocate: Callable[[int], Any] | None = None,
        make_flags: Callable[..., SharedFlags] = make_shared_flags,
    ) -> None:
        shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
        node_comm = MPI.Intracomm(shared.Split(nodes[comm.rank] if nodes else 0))
        shared.Free()
        self._comm = comm
        self._row = MPI.BYTE.Create_contiguous(row_bytes).Commit()
        self._ranks: list[int] = node_comm.allgather(comm.rank)
        self._local_ranks = {rank: peer for peer, rank in enumerate(self._ranks)}
        self._local_rank = node_comm.rank
        self._in_place = slots.in_place
        self._has_others = len(self._ranks) < comm.size
        slot_bytes = node_comm.allreduce(slots.num_bytes, MPI.MAX)  # groups of a stage can differ in their rows
        window_bytes = node_comm.allreduce(_free_bytes() // SHARE_OF_FREE // slots.windows, MPI.MIN)
        allowed_bytes = window_bytes // (2 * node_comm.size)
        aligned = math.lcm(row_bytes, ALIGNMENT_BYTES)
        self._slot_rows = min(-(-slot_bytes // aligned), allowed_bytes // aligned) * aligned // row_bytes
        self._window, memory = _open(
            node_comm, flags_bytes(node_comm.size), 2 * node_comm.size * self._slot_rows * row_bytes
        )
        words = memory[: flags_bytes(node_comm.size)]
        self.slots = memory[len(words) :].reshape(-1, row_bytes)
        slots.register(self.slots)
        self.flags = make_flags(
            words, self._ranks, own=self._local_rank, slot_rows=self._slot_rows, sync=self._window.Sync
        )
        self._overflow = BufferRing(2, allocate or partial(aligned_rows, row_bytes=row_bytes))
        self._number = 0

    def outgoing(self, rows: int) -> Any:
        parity = (self._number + 1) % 2
        while not self.flags.slot_is_free(parity):
            self.pause()
        if rows > self._slot_rows:
            return self._overflow.take(rows)
        first = (2 * self._local_rank + parity) * self._slot_rows
        return self.slots[first : first + rows]

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> SharedReceipt:
        self._number += 1
        receipt = SharedReceipt(self, self._number, incoming, recv_counts, [])
        fits = len(outgoing) <= self._slot_rows
        if not fits or self._has_others:
            self._exchange_messages(receipt, outgoing, send_counts, fits=fits)
        self.flags.signal(self._number, fits=fits, sent=send_counts, received=recv_counts, num_rows=len(incoming))
        return receipt

    def reads_in_place(self, counts: IntArray) -> bool:
        """Whether rows that node_comm posted in their rooms are read there: those of other nodes do not lie there."""
        return self._in_place and not (self._has_others and self._has_rows_of_other_nodes(counts))

    def fetch(self, receipt: SharedReceipt) -> None:
        """All node_comm have posted: copy their rows, and ask for what comes as messages."""
        for rank, (first, last) in blocks(receipt.counts).items():
            if rank in self._local_ranks:
                self._copy_from(receipt, rank, first, last)
        self.flags.release(receipt.number)

    def pause(self) -> None:
        """Between two looks at the board: MPI moves other transfers on, and another process may have the core."""
        self._comm.Iprobe()
        os.sched_yield()

    def _exchange_messages(self, receipt: SharedReceipt, outgoing: Any, send_counts: IntArray, *, fits: bool) -> None:
        """Ask for the rows of other nodes, and send what goes there or does not fit."""
        for rank, (first, last) in blocks(receipt.counts).items():
            if rank not in self._local_ranks:
                receipt.requests.append(self._receive(receipt, rank, first, last))
        for rank, (first, last) in blocks(send_counts).items():
            if rank == self._comm.rank:
                receipt.overflow = None if fits else outgoing[first:last]
            elif rank not in self._local_ranks or not fits:
                message = [outgoing[first:last], last - first, self._row]
                receipt.requests.append(self._comm.Isend(message, rank, receipt.number % TAGS))

    def _has_rows_of_other_nodes(self, counts: IntArray) -> bool:
        return any(rank not in self._local_ranks for rank in blocks(counts))

    def _copy_from(self, receipt: SharedReceipt, rank: int, first: int, last: int) -> None:
        """Copy the rows of a neighbour, or of this rank itself, to the receiver's buffer."""
        peer = self._local_ranks[rank]
        begin = self.flags.first_row(receipt.number, peer)
        if begin != BY_MESSAGE:
            begin += (2 * peer + receipt.number % 2) * self._slot_rows
            copy_rows(receipt.incoming, (first, last), self.slots[begin : begin + last - first])
        elif peer == self._local_rank:
            copy_rows(receipt.incoming, (first, last), receipt.overflow)
        else:
            receipt.requests.append(self._receive(receipt, rank, first, last))

    def _receive(self, receipt: SharedReceipt, rank: int, first: int, last: int) -> MPI.Request:
        message = [receipt.incoming[first:last], last - first, self._row]
        return self._comm.Irecv(message, rank, receipt.number % TAGS)


def _free_bytes() -> int:
    """What is free of the memory that MPI takes such windows from."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 1 << 62


def _open(node_comm: MPI.Intracomm, words_bytes: int, slots_bytes: int) -> tuple[MPI.Win, npt.NDArray[np.uint8]]:
    """A window of all node_comm, in one piece, its words zero; collective."""
    whole = words_bytes + slots_bytes + ALIGNMENT_BYTES
    window = MPI.Win.Allocate_shared(whole if node_comm.rank == 0 else 0, 1, comm=node_comm)
    window.Lock_all(MPI.MODE_NOCHECK)
    segment: Any = window.Shared_query(0)[0]
    memory: npt.NDArray[np.uint8] = np.frombuffer(segment, np.uint8)
    skip = -memory.ctypes.data % ALIGNMENT_BYTES
    memory = memory[skip : skip + words_bytes + slots_bytes]
    if node_comm.rank == 0:
        memory[:words_bytes] = 0
    window.Sync()
    node_comm.Barrier()
    window.Sync()
    return window, memory
