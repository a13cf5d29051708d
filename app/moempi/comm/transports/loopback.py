"""The transport of a rank that is alone in its group: rows stay where they were packed."""

from collections.abc import Callable
from typing import Any

from moempi.arrays import IntArray
from moempi.comm.transfers import NO_REQUEST
from moempi.comm.transports.base import BufferReceipt
from moempi.comm.transports.buffers import BufferRing


class Loopback:
    """Hands packed rows back to their sender; `allocate(rows)` makes a buffer."""

    name = "loopback"

    def __init__(self, allocate: Callable[[int], Any]) -> None:
        self._buffers = BufferRing(2, allocate)

    def outgoing(self, rows: int) -> Any:
        """A buffer for the next `send`, reused two transfers later."""
        return self._buffers.take(rows)

    def incoming(self, rows: int) -> Any:
        """None: the rows are received where they were packed."""

    def can_send(self) -> bool:
        """Whether the next buffer is free: always."""
        return True

    def send(self, outgoing: Any, counts: IntArray) -> None:
        """Note the rows."""
        self._sent = outgoing

    def receive(self, incoming: Any, counts: IntArray) -> BufferReceipt:
        """A receipt, already complete, of the rows that were sent."""
        return BufferReceipt(NO_REQUEST, self._sent)

    def free(self) -> None:
        """Nothing needs to be freed."""
