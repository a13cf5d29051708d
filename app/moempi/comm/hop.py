"""One hop of rows between the ranks of one communicator, by one transport."""

from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from moempi.arrays import IntArray
from moempi.backend.protocol import Backend
from moempi.backend.values import Array
from moempi.comm.addends import NO_ADDENDS, Addends, Sums
from moempi.comm.transfers import Condition, Steps, Transfer, Transfers
from moempi.comm.transports.base import Receipt, Transport


class Hop:
    """Sends rows between the ranks of `comm`; a `send` and its receipt are collective.

    Two transfers may be pending at a time; a transfer's receipt is requested before the next `send`. Each received
    transfer must be unpacked or combined exactly once.
    """

    def __init__(self, comm: MPI.Intracomm, backend: Backend, *, transfers: Transfers, transport: Transport) -> None:
        self.comm = comm
        self.backend = backend
        self.transfers = transfers
        self._transport = transport
        self._reserved: tuple[Any, Array | None] | None = None

    def reserve(self, num_rows: int) -> Array | None:
        """As `reserve_steps`; blocks until the buffer is free."""
        if not self._transport.can_send():
            self.transfers.start(self._free_steps()).finish()
        return self._take_outgoing(num_rows)

    def reserve_steps(self, num_rows: int) -> Steps[Array | None]:
        """The buffer (num_rows, D) that `send` takes next, for verbs that write there; None if it packs rows.

        These rows are then sent in their order. The buffer is free when the receivers have read the rows of the
        transfer before the last one.
        """
        yield from self._free_steps()
        return self._take_outgoing(num_rows)

    def pack_steps(self, rows: Array) -> Steps[Array]:
        """Pack all rows, in their order, into the buffer that `send` takes next; the value is the buffer."""
        yield from self._free_steps()
        outgoing = self._transport.outgoing(len(rows))
        buffer = self._rows_of(outgoing)
        self.backend.pack(rows, None, buffer)
        self._reserved = outgoing, buffer
        return buffer

    def _take_outgoing(self, num_rows: int) -> Array | None:
        outgoing = self._transport.outgoing(num_rows)
        rows = self.backend.rows_in(self._rows_of(outgoing))
        self._reserved = outgoing, rows
        return rows

    def send(self, rows: Array, index: Array | None, counts: IntArray, *, written: bool = False) -> Transfer[None]:
        """Start to send rows[index], or all rows if None, ordered by destination: counts (R,) rows to each rank.

        The transfer is finished when the rows are packed and sent. It waits until the rows of the transfer before the
        last one are read, but not for the receivers of its own rows. With `written`, the rows are already in
        the memory that `reserve` or `pack_steps` gave, and the verbs that wrote them are done.
        """
        return self.transfers.start(self._send_steps(rows, index, counts, written))

    def receive_steps(self, sending: Transfer[None], counts: IntArray) -> Steps[Receipt]:
        """Receive counts (R,) rows from each rank, once the `send` of this rank is finished; the value is the receipt.

        Verbs that read the buffer earlier are done then: they were submitted before the rows were packed.
        """
        if not sending.finished:
            yield sending
        sending.finish()
        receipt = self._transport.receive(self._transport.incoming(sum(counts.tolist())), counts)
        yield receipt
        return receipt

    def exchange_steps(
        self, rows: Array, index: Array | None, send_counts: IntArray, recv_counts: IntArray
    ) -> Steps[Receipt]:
        """Send and receive rows of which both counts (R,) are known; the value is the receipt."""
        return (yield from self.receive_steps(self.send(rows, index, send_counts), recv_counts))

    def _send_steps(self, rows: Array, index: Array | None, counts: IntArray, written: bool) -> Steps[None]:
        (outgoing, reserved), self._reserved = self._reserved or (None, None), None
        if outgoing is None:
            yield from self._free_steps()
            outgoing = self._transport.outgoing(int(counts.sum()))
        if rows is not reserved:
            self.backend.pack(rows, index, self._rows_of(outgoing))
        needs_event = self.comm.size > 1 and not written  # alone: the rows stay in the same queue
        event = self.backend.record_event() if needs_event else None
        if event is not None:
            yield Condition(event.is_done)
        self._transport.send(outgoing, counts)

    def _free_steps(self) -> Steps[None]:
        """Wait until the next buffer to send from is free."""
        if not self._transport.can_send():
            yield Condition(self._transport.can_send)

    def free(self) -> None:
        """Free the transport, once all receipts are unpacked or combined; collective, blocks."""
        self._transport.free()

    def unpack(self, receipt: Receipt, order: IntArray | None) -> Array:
        """The received rows in a new order: row i is received row order[i]. None keeps the order by source."""
        buffer, rows = receipt.rows()
        unpacked = self.backend.unpack(self._rows_of(buffer), _compose(rows, order))
        receipt.release()
        return unpacked

    def combine(
        self,
        receipt: Receipt,
        output_rows: Array,
        weights: Array,
        addends: Addends = NO_ADDENDS,
        *,
        on_outputs: Callable[[Array, Array], None] = lambda rows, output_rows: None,
    ) -> Sums:
        """Weighted sums (T, D) of the received rows output_rows (T, K), in slot order, plus the addends.

        `on_outputs` is called before with the received rows and their index (T, K).
        """
        buffer, rows = receipt.rows()
        received, index = self._rows_of(buffer), _compose(rows, output_rows)
        on_outputs(received, index)
        combined = addends.combine(self.backend, received, index, weights)
        receipt.release()
        return combined

    def _rows_of(self, buffer: Array) -> Array:
        """A buffer of a transport as rows; a view takes the host longer than the comparison."""
        kind = self.backend.row_dtype
        return buffer if buffer.dtype == kind else buffer.view(kind)


def _compose(rows: IntArray | None, order: Any) -> Any:
    """rows[order], where None is the identity."""
    if rows is None:
        return order
    return rows if order is None else rows[order]
