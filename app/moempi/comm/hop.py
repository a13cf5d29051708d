"""One hop of rows between the ranks of one communicator, by one transport."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mpi4py import MPI

from moempi.arrays import IntArray
from moempi.backend.protocol import Array, Backend
from moempi.comm.transfers import Condition, Steps, Transfer, Transfers, after_verbs
from moempi.comm.transports.base import Receipt, Transport


class Hop:
    """Sends rows between the ranks of `comm`; `send` and `send_steps` are collective.

    Two transfers may be pending at a time. Each received transfer must be unpacked or combined exactly once.
    """

    def __init__(self, comm: MPI.Intracomm, backend: Backend, *, transfers: Transfers, transport: Transport) -> None:
        self.comm = comm
        self.backend = backend
        self.transfers = transfers
        self._transport = transport

    def send(self, rows: Array, index: Array | None, send_counts: IntArray, recv_counts: IntArray) -> Transfer[Receipt]:
        """Start the transfer of `send_steps`."""
        return self.transfers.start(self.send_steps(rows, index, send_counts, recv_counts))

    def send_steps(
        self, rows: Array, index: Array | None, send_counts: IntArray, recv_counts: IntArray
    ) -> Steps[Receipt]:
        """Send rows[index], or all rows if None, which are ordered by destination; the value is the receipt.

        Counts (R,) are rows to and from each rank.
        """
        if not self._transport.can_send():
            yield Condition(self._transport.can_send)
        outgoing = self._transport.outgoing(int(send_counts.sum()))
        self.backend.pack(rows, index, outgoing.view(self.backend.row_dtype))
        incoming = self._transport.incoming(int(recv_counts.sum()))
        start = partial(self._transport.start, outgoing, send_counts, incoming, recv_counts)
        if self.comm.size == 1:  # the next verbs on the rows are in the same queue
            receipt = start()
            yield receipt
            return receipt
        return (yield from after_verbs(self.backend, start))

    def free(self) -> None:
        """Free the transport, once all receipts are unpacked or combined; collective, blocks."""
        self._transport.free()

    def unpack(self, receipt: Receipt, order: IntArray | None) -> Array:
        """The received rows in a new order: row i is received row order[i]. None keeps the order by source."""
        buffer, rows = receipt.rows()
        unpacked = self.backend.unpack(buffer.view(self.backend.row_dtype), _compose(rows, order))
        receipt.release()
        return unpacked

    def combine(
        self,
        receipt: Receipt,
        output_rows: Array,
        weights: Array,
        addends: Sequence[Array] = (),
        *,
        on_outputs: Callable[[Array, Array], None] | None = None,
    ) -> Array:
        """Weighted sums (T, D) of the received rows output_rows (T, K), in slot order, plus the addends (T, D).

        `on_outputs` is called before with the received rows and their index (T, K).
        """
        buffer, rows = receipt.rows()
        received, index = buffer.view(self.backend.row_dtype), _compose(rows, output_rows)
        if on_outputs is not None:
            on_outputs(received, index)
        combined = self.backend.combine(received, index, weights, addends)
        receipt.release()
        return combined


def _compose(rows: IntArray | None, order: Any) -> Any:
    """rows[order], where None is the identity."""
    if rows is None:
        return order
    return rows if order is None else rows[order]
