"""`cuda_ipc`: inside a node, receivers copy rows out of the GPU memory of their senders, which they have mapped.

A sender packs its rows into one of two slots in its GPU's memory, one for even and one for odd transfer numbers, then
signals to each receiver over flags in shared memory (shared_flags.py). When all senders have signalled, a receiver
submits a copy of each sender's rows to its own buffer. Copy engines move the rows, over NVLink between GPUs that have
it, while kernels compute. The end of the copies frees the slots for the transfer after the next.

A slot that is too small is replaced by a larger one. Its handle is written beside the flags, and a receiver maps it
before its first copy. Replaced slots are freed with the transport, because receivers have mapped them.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from mpi4py import MPI
from msgspec import Struct

from moempi.arrays import IntArray
from moempi.backend.protocol import HANDLE_BYTES, Event, PeerMemory, RowCopy
from moempi.backend.values import Array
from moempi.comm.transports.buffers import BufferRing
from moempi.comm.transports.pairwise import blocks
from moempi.comm.transports.shared import open_window
from moempi.comm.transports.shared_flags import WAITING, SharedFlags, flags_bytes, make_shared_flags
from moempi.errors import ConfigError
from moempi.layout.row_buffers import grown

SLOT = np.dtype([("version", np.int64), ("rows", np.int64), ("handle", np.uint8, HANDLE_BYTES), ("unused", "V48")])
"""A slot as its owner describes it, in two cache lines: how often it was replaced, its rows, its handle."""


@dataclass(slots=True)
class IpcReceipt:
    """The receipt of `counts` (R,) rows from each rank, which are copied to `incoming`."""

    transport: "CudaIpc"
    number: int
    incoming: Any
    counts: IntArray
    copied: Event | None = None
    is_complete: bool = False

    def Test(self) -> bool:  # noqa: N802
        if self.is_complete:
            return True
        if self.copied is None:
            if self.transport.flags.poll(self.number) == WAITING:
                return False
            self.copied = self.transport.copy_from_slots(self)
        if not len(self.incoming) or self.copied.is_done():
            self.transport.flags.release(self.number)
            self.is_complete = True
        return self.is_complete

    def rows(self) -> tuple[Any, IntArray | None]:
        return self.incoming, None

    def release(self) -> None:
        """Do nothing: the slots are free when the rows are copied."""


class MappedSlot(Struct, frozen=True):
    """Another rank's slot, mapped by this process, and its version."""

    version: int
    rows: Array


class CudaIpc:
    """Rows of `width` elements between the ranks of one node, in GPU memory; the constructor is collective.

    Each slot has `least_rows` at least.
    """

    name = "cuda_ipc"

    def __init__(
        self,
        comm: MPI.Intracomm,
        memory: PeerMemory,
        *,
        width: int,
        least_rows: int = 1,
        make_flags: Callable[..., SharedFlags] = make_shared_flags,
    ) -> None:
        self._comm = comm.Dup()
        self._memory = memory
        self._width = width
        self._least_rows = least_rows
        words_bytes, slots_bytes = flags_bytes(comm.size), 2 * comm.size * SLOT.itemsize
        self._window, words = open_window(self._comm, words_bytes + slots_bytes, 0)
        self._slots: npt.NDArray[Any] = words[words_bytes:].view(SLOT).reshape(comm.size, 2)
        self.flags = make_flags(
            words[:words_bytes], range(comm.size), own=comm.rank, slot_rows=0, sync=self._window.Sync
        )
        self._incoming = BufferRing(2, lambda rows: memory.allocate(rows, width))
        self._own: list[list[Array]] = [[], []]
        self._mapped: dict[tuple[int, int], list[MappedSlot]] = {}
        self._receipts: list[IpcReceipt | None] = [None, None]
        self._number = 0

    def free(self) -> None:
        """Free the GPU memory when no rank maps it any more; collective, blocks."""
        for slots in self._mapped.values():
            for slot in slots:
                self._memory.unmap(slot.rows)
        self._comm.Barrier()
        self._own.clear()
        self._receipts.clear()
        self._window.Unlock_all()
        self._window.Free()
        self._comm.Free()

    def incoming(self, rows: int) -> Any:
        return self._incoming.take(rows)

    def outgoing(self, rows: int) -> Any:
        while not self.can_send():
            os.sched_yield()
        parity = (self._number + 1) % 2
        own = self._own[parity]
        if not own or len(own[-1]) < rows:
            own.append(self._new_slot(parity, max(self._least_rows, grown(rows))))
        return own[-1][:rows]

    def can_send(self) -> bool:
        return self.flags.slot_is_free((self._number + 1) % 2)

    def send(self, outgoing: Any, counts: IntArray) -> None:
        """Raises RuntimeError if two transfers are pending: their slots are in use."""
        self._number += 1
        earlier = self._receipts[self._number % 2]
        if earlier is not None and not earlier.is_complete:
            raise RuntimeError("a third transfer of cuda_ipc was started while two are pending")
        self.flags.signal(self._number, fits=True, sent=counts)

    def receive(self, incoming: Any, counts: IntArray) -> IpcReceipt:
        # Without rows, the flags compute no index of the rows, which receivers of blocks do not need.
        self.flags.expect(self._number, received=counts, num_rows=0)
        receipt = self._receipts[self._number % 2] = IpcReceipt(self, self._number, incoming, counts)
        return receipt

    def copy_from_slots(self, receipt: IpcReceipt) -> Event:
        """Submit the copies of a transfer that all senders have signalled; the event is behind them.

        Each rank begins with the rank behind it, so that they do not all read from one GPU at a time.
        """
        parity, own, size = receipt.number % 2, self._comm.rank, self._comm.size
        received = sorted(blocks(receipt.counts).items(), key=lambda block: (block[0] - own - 1) % size)
        copies = [
            RowCopy(self._slot(rank, parity), self.flags.first_row(receipt.number, rank), first, last - first)
            for rank, (first, last) in received
        ]
        return self._memory.copy(copies, receipt.incoming)

    def _new_slot(self, parity: int, rows: int) -> Array:
        slot, described = self._memory.allocate(rows, self._width), self._slots[self._comm.rank, parity]
        described["rows"], described["handle"] = rows, np.frombuffer(self._memory.handle(slot), np.uint8)
        described["version"] += 1
        return slot

    def _slot(self, rank: int, parity: int) -> Array:
        """The rows of a rank's slot, which is mapped if it is new."""
        if rank == self._comm.rank:
            return self._own[parity][-1]
        described, mapped = self._slots[rank, parity], self._mapped.setdefault((rank, parity), [])
        version = int(described["version"])
        if not mapped or mapped[-1].version != version:
            try:
                rows = self._memory.map(described["handle"].tobytes(), int(described["rows"]), self._width)
            except ConfigError as error:
                raise ConfigError(
                    f'from rank {rank} of the node: {error}; use exchange.transport = "alltoallv"'
                ) from error
            mapped.append(MappedSlot(version, rows))
        return mapped[-1].rows
