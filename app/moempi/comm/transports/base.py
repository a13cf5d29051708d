"""What every transport offers, and the receipt of the rows that it moves."""

from dataclasses import dataclass
from typing import Any, Protocol

from moempi.arrays import IntArray


class MpiRequest(Protocol):
    """The part of MPI's request interface that transfers use."""

    def Test(self) -> bool:  # noqa: N802
        """Make progress; whether the request is complete. Does not block."""

    def Wait(self) -> Any:  # noqa: N802
        """Block until the request is complete."""


class Receipt(MpiRequest, Protocol):
    """What a transport starts: a request, and the received rows once it is complete."""

    def rows(self) -> tuple[Any, IntArray | None]:
        """An array, and the index in it of each received row, ordered by source; None if they are its first rows."""

    def release(self) -> None:
        """Allow the rows to be overwritten: they have been read."""


@dataclass(frozen=True, slots=True)
class BufferReceipt:
    """A transfer into the receiver's own buffer."""

    request: MpiRequest
    incoming: Any

    def Test(self) -> bool:  # noqa: N802
        return self.request.Test()

    def Wait(self) -> None:  # noqa: N802
        self.request.Wait()

    def rows(self) -> tuple[Any, IntArray | None]:
        return self.incoming, None

    def release(self) -> None:
        """Nothing to do: the buffer is the receiver's."""


class Transport(Protocol):
    """A way to send rows of a fixed number of bytes between the ranks of a group.

    Starting a transfer is collective over the group, in the same order on all ranks. Two may be pending at a time.
    """

    name: str

    def outgoing(self, rows: int) -> Any:
        """A buffer (rows, row bytes) of uint8 for the rows of the next `start`, where this transport reads them best.

        The buffer is used again two transfers later. Blocks until the receivers have read what it held.
        """

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> Receipt:
        """Send rows of `outgoing`, ordered by destination, and receive into `incoming`, ordered by source.

        `outgoing` is the buffer of the last call of that name. Counts (R,) are rows of each rank. Does not block; both
        buffers stay untouched until the request is complete. The rows need not arrive in `incoming`: see `Receipt`.
        """
