"""`shared`: inside a node, rows stay where their sender packed them, and the receivers read them there.

A window of shared memory holds flags (shared_flags.py) and two slots for each rank of the node, one for even and one
for odd transfer numbers. A sender packs its rows into its slot, then signals to each receiver the number of the
transfer and the receiver's first row in the slot. When all senders have signalled, a receiver knows the slot row of
each of its rows and reads the rows there, once. `release` then flags the number as read, which frees the slot for the
transfer after the next.

Rows between nodes, and rows that exceed the slot, are sent as messages into the receiver's own buffer. The flag of rows
that exceed the slot says so. In a transfer with such rows, the receiver copies all other rows into the same buffer.
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

from moempi.arrays import ALIGNMENT_BYTES, IntArray
from moempi.comm.transports.base import BufferedTransport
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
"""At most 1 / SHARE_OF_FREE of the free space in SHARED_MEMORY is used: a write past its end raises SIGBUS."""


@dataclass(slots=True)
class SharedReceipt:
    """The receipt of `counts` (R,) rows from each rank; `in_slots` if all of them stay in their senders' slots.

    `requests` are the messages of the transfer. `overflow` are this rank's rows for itself if its slot is too small.
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
        if not self.signalled:
            found = self.transport.flags.poll(self.number)
            if found == WAITING:
                return False
            self.signalled = True
            self.in_slots = found == ALL_IN_SLOTS and self.transport.reads_in_place(self.counts)
            if not self.in_slots:
                self.transport.copy_from_slots(self)
        return not self.requests or bool(MPI.Request.Testall(self.requests))

    def rows(self) -> tuple[Any, IntArray | None]:
        if not self.in_slots:
            return self.incoming, None
        return self.transport.slots, self.transport.flags.rows(self.number, len(self.incoming))

    def release(self) -> None:
        if self.in_slots:
            self.transport.flags.release(self.number)


@dataclass(frozen=True, slots=True)
class SlotOptions:
    """The shared memory of a `Shared` transport: two slots of `num_bytes` for each rank.

    The slots are smaller if `windows` such windows would take too much of the node's shared memory. `register` is
    called with the memory of all slots before it is used, `unregister` before it is freed. Without `in_place`,
    receivers copy their rows out of it.
    """

    num_bytes: int = SLOT_BYTES
    windows: int = 1
    in_place: bool = True
    register: Callable[[npt.NDArray[np.uint8]], None] = lambda memory: None
    unregister: Callable[[npt.NDArray[np.uint8]], None] = lambda memory: None


class Shared(BufferedTransport):
    """Rows through one window of shared memory per node; `nodes` (R,) are the ranks' nodes, by default all one node.

    `allocate(rows)` makes the buffers of rows that exceed a slot. The constructor is collective.
    """

    name = "shared"

    def __init__(
        self,
        comm: MPI.Intracomm,
        *,
        row_bytes: int,
        nodes: tuple[int, ...] = (),
        slots: SlotOptions = SlotOptions(),
        allocate: Callable[[int], Any] | None = None,
        make_flags: Callable[..., SharedFlags] = make_shared_flags,
    ) -> None:
        super().__init__(comm, row_bytes=row_bytes, allocate=allocate)
        shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self._node_comm = node_comm = MPI.Intracomm(shared.Split(nodes[comm.rank] if nodes else 0))
        shared.Free()
        ranks: list[int] = node_comm.allgather(comm.rank)
        self._local_ranks = {rank: local_rank for local_rank, rank in enumerate(ranks)}
        self._local_rank = node_comm.rank
        self._in_place = slots.in_place
        self._spans_nodes = len(ranks) < comm.size
        self._slot_rows = _slot_rows(node_comm, slots, row_bytes)
        words_bytes = flags_bytes(node_comm.size)
        self._window, memory = open_window(node_comm, words_bytes, 2 * node_comm.size * self._slot_rows * row_bytes)
        self.slots = memory[words_bytes:].reshape(-1, row_bytes)
        slots.register(self.slots)
        self._unregister = partial(slots.unregister, self.slots)
        self.flags = make_flags(
            memory[:words_bytes], ranks, own=self._local_rank, slot_rows=self._slot_rows, sync=self._window.Sync
        )
        self._number = 0
        self._sends: list[MPI.Request] = []
        self._overflow: Any = None

    def free(self) -> None:
        self._unregister()
        self._window.Unlock_all()
        self._window.Free()
        self._node_comm.Free()
        super().free()

    def outgoing(self, rows: int) -> Any:
        while not self.can_send():
            os.sched_yield()
        if rows > self._slot_rows:
            return super().outgoing(rows)
        first = (2 * self._local_rank + self._next_slot) * self._slot_rows
        return self.slots[first : first + rows]

    def can_send(self) -> bool:
        return self.flags.slot_is_free(self._next_slot)

    @property
    def _next_slot(self) -> int:
        return (self._number + 1) % 2

    def send(self, outgoing: Any, counts: IntArray) -> None:
        self._number += 1
        fits = len(outgoing) <= self._slot_rows
        self._sends, self._overflow = [], None
        if not fits or self._spans_nodes:
            self._send_messages(outgoing, counts, fits=fits)
        self.flags.signal(self._number, fits=fits, sent=counts)

    def receive(self, incoming: Any, counts: IntArray) -> SharedReceipt:
        receipt = SharedReceipt(self, self._number, incoming, counts, self._sends, self._overflow)
        if self._spans_nodes:
            for rank, (first, last) in blocks(counts).items():
                if rank not in self._local_ranks:
                    receipt.requests.append(self._receive(receipt, rank, first, last))
        self.flags.expect(self._number, received=counts, num_rows=len(incoming))
        return receipt

    def reads_in_place(self, counts: IntArray) -> bool:
        """Whether rows that all lie in slots are read there: not if rows of other nodes are received beside them."""
        return self._in_place and not (self._spans_nodes and self._has_rows_of_other_nodes(counts))

    def copy_from_slots(self, receipt: SharedReceipt) -> None:
        """Copy the node's rows, once all are signalled, and start to receive those that exceed their slot."""
        for rank, (first, last) in blocks(receipt.counts).items():
            if rank in self._local_ranks:
                self._copy_from(receipt, rank, first, last)
        self.flags.release(receipt.number)

    def _send_messages(self, outgoing: Any, counts: IntArray, *, fits: bool) -> None:
        """Start to send messages: to other nodes, and inside the node if the rows exceed this rank's slot."""
        for rank, (first, last) in blocks(counts).items():
            if rank == self._comm.rank:
                self._overflow = None if fits else outgoing[first:last]
            elif rank not in self._local_ranks or not fits:
                message = [outgoing[first:last], last - first, self._row]
                self._sends.append(self._comm.Isend(message, rank, self._number % TAGS))

    def _has_rows_of_other_nodes(self, counts: IntArray) -> bool:
        return any(rank not in self._local_ranks for rank in blocks(counts))

    def _copy_from(self, receipt: SharedReceipt, rank: int, first: int, last: int) -> None:
        """Copy rows from a rank of the node, or start to receive them if they are sent as a message."""
        local_rank = self._local_ranks[rank]
        begin = self.flags.first_row(receipt.number, local_rank)
        if begin != BY_MESSAGE:
            begin += (2 * local_rank + receipt.number % 2) * self._slot_rows
            copy_rows(receipt.incoming, (first, last), self.slots[begin : begin + last - first])
        elif local_rank == self._local_rank:
            copy_rows(receipt.incoming, (first, last), receipt.overflow)
        else:
            receipt.requests.append(self._receive(receipt, rank, first, last))

    def _receive(self, receipt: SharedReceipt, rank: int, first: int, last: int) -> MPI.Request:
        message = [receipt.incoming[first:last], last - first, self._row]
        return self._comm.Irecv(message, rank, receipt.number % TAGS)


def _free_bytes() -> int:
    """Free bytes in the file system from which MPI takes shared windows."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 1 << 62


def _slot_rows(node_comm: MPI.Intracomm, slots: SlotOptions, row_bytes: int) -> int:
    """Rows of each slot, the same on all ranks of the node; collective. Every slot begins at an aligned address."""
    wanted_bytes = node_comm.allreduce(slots.num_bytes, MPI.MAX)  # groups of a stage can differ in their rows
    window_bytes = node_comm.allreduce(_free_bytes() // SHARE_OF_FREE // slots.windows, MPI.MIN)
    allowed_bytes = window_bytes // (2 * node_comm.size)
    aligned = math.lcm(row_bytes, ALIGNMENT_BYTES)
    rows: int = min(-(-wanted_bytes // aligned), allowed_bytes // aligned) * aligned // row_bytes
    return rows


def open_window(node_comm: MPI.Intracomm, words_bytes: int, slots_bytes: int) -> tuple[MPI.Win, npt.NDArray[np.uint8]]:
    """A contiguous window of the ranks of a node, and its memory: words that are zero, then slots; collective."""
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
