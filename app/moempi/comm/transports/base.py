"""The interfaces of transports and of the receipts of the rows that they move, and bases for both."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from mpi4py import MPI

from moempi.arrays import IntArray, aligned_rows
from moempi.comm.transports.buffers import BufferRing


class Completion(Protocol):
    """The part of MPI's request interface that transfers use."""

    def Test(self) -> bool:  # noqa: N802
        """Make progress; whether the request is complete. Does not block."""


def wait(request: Completion) -> None:
    """Block until the request is complete. Only for a request of no lane: other transfers do not advance."""
    while not request.Test():
        os.sched_yield()


class Receipt(Completion, Protocol):
    """The request of one transfer, and the received rows once it is complete."""

    def rows(self) -> tuple[Any, IntArray | None]:
        """An array, and the index in it of each received row, ordered by source; None if they are its first rows."""

    def release(self) -> None:
        """Allow the transport to overwrite the received rows. Called once, after they are read."""


class Transport(Protocol):
    """A way to send rows of a fixed number of bytes between the ranks of a group.

    A transfer is a `send`, then a `receive`; both are collective over the group, in the same order on all ranks, and do
    not block. `send` needs nothing of the receivers, which may not know yet how many rows there are; a collective
    transport sends when this rank receives. Two transfers may be pending at a time.
    """

    name: str

    def outgoing(self, rows: int) -> Any:
        """A buffer (rows, row bytes) of uint8 for the rows of the next `send`.

        The buffer is reused two transfers later. Blocks until `can_send`.
        """

    def incoming(self, rows: int) -> Any:
        """A buffer (rows, row bytes) for the rows of the next `receive`, reused two transfers later."""

    def can_send(self) -> bool:
        """Whether the receivers have read the rows that the next outgoing buffer held; does not block."""

    def send(self, outgoing: Any, counts: IntArray) -> None:
        """Send the rows of `outgoing`, ordered by destination: counts (R,) rows to each rank.

        The buffer is the one that the last `outgoing` returned. It may not change until the transfer's receipt is
        complete.
        """

    def receive(self, incoming: Any, counts: IntArray) -> Receipt:
        """Receive the rows of the transfer that was sent last, ordered by source: counts (R,) rows from each rank.

        `incoming` is the buffer that the last call of this name returned, and may not change until the receipt is
        complete. A transport may leave the received rows elsewhere: `Receipt.rows` returns where they are.
        """

    def free(self) -> None:
        """Free communicators and memory, once all transfers are complete and released; collective, blocks."""


def start_transfer(
    transport: Transport, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray
) -> Receipt:
    """Start a transfer of which both counts (R,) are known; collective, does not block."""
    transport.send(outgoing, send_counts)
    return transport.receive(incoming, recv_counts)


class BufferReceipt(NamedTuple):
    """The receipt of rows that `request` receives into the buffer `incoming`."""

    request: Completion
    incoming: Any

    def Test(self) -> bool:  # noqa: N802
        return self.request.Test()

    def rows(self) -> tuple[Any, IntArray | None]:
        return self.incoming, None

    def release(self) -> None:
        """Do nothing: the buffer is the caller's."""


class BufferedTransport:
    """A base for transports that use two buffers in alternation for each direction; the constructor is collective.

    They send over a duplicate of `comm`: rows are sent when their verbs are done, not in the program order of the
    collectives on `comm`. A row is one MPI datatype of `row_bytes`, so counts are rows and fit into an int.
    `allocate(rows)` makes a buffer, on the host by default.
    """

    def __init__(self, comm: MPI.Intracomm, *, row_bytes: int, allocate: Callable[[int], Any] | None = None) -> None:
        self._comm = comm.Dup()
        self._row = MPI.BYTE.Create_contiguous(row_bytes).Commit()
        allocate = allocate or partial(aligned_rows, row_bytes=row_bytes)
        self._outgoing, self._incoming = BufferRing(2, allocate), BufferRing(2, allocate)

    def outgoing(self, rows: int) -> Any:
        return self._outgoing.take(rows)

    def incoming(self, rows: int) -> Any:
        return self._incoming.take(rows)

    def can_send(self) -> bool:
        return True

    def free(self) -> None:
        self._row.Free()
        self._comm.Free()


class TransportWrapper:
    """A base for transports that add something to every transfer of another transport."""

    def __init__(self, transport: Transport) -> None:
        self.name = transport.name
        self._transport = transport

    def outgoing(self, rows: int) -> Any:
        return self._transport.outgoing(rows)

    def incoming(self, rows: int) -> Any:
        return self._transport.incoming(rows)

    def can_send(self) -> bool:
        return self._transport.can_send()

    def free(self) -> None:
        self._transport.free()


@dataclass(slots=True)
class ReceiptWrapper:
    """A base for receipts that are complete later than the `receipt` of the same rows."""

    receipt: Receipt

    def rows(self) -> tuple[Any, IntArray | None]:
        return self.receipt.rows()

    def release(self) -> None:
        self.receipt.release()
