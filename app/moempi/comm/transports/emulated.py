"""Emulated links: another transport's rows, delayed by a chosen latency and bandwidth."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moempi.arrays import IntArray
from moempi.comm.transports.base import ReceiptWrapper, Transport, TransportWrapper


@dataclass(slots=True)
class Link:
    """One rank's full-duplex link, which all its lanes share: it carries one transfer after another.

    A transfer occupies the link for its bytes (the larger of both directions) / `bytes_per_s` and arrives `latency_s`
    later. `free_at` is when the link becomes free, by `time.perf_counter`; `busy_s` the seconds that it was occupied.
    """

    latency_s: float
    bytes_per_s: float
    free_at: float = 0.0
    busy_s: float = 0.0

    def arrival(self, num_bytes: int) -> float:
        """Occupy the link with a transfer from now on; its arrival time by `time.perf_counter`."""
        carrying_s = num_bytes / self.bytes_per_s
        self.free_at = max(time.perf_counter(), self.free_at) + carrying_s
        self.busy_s += carrying_s
        return self.free_at + self.latency_s


Links = Mapping[int, Link]
"""The links of a rank by level, an index into `topology.LEVELS`; rows of other levels are not delayed."""


@dataclass(slots=True)
class DelayedReceipt(ReceiptWrapper):
    """A receipt that is complete once its rows are received and the time `arrival` has come."""

    arrival: float

    def Test(self) -> bool:  # noqa: N802
        return self.receipt.Test() and time.perf_counter() >= self.arrival


class EmulatedLinks(TransportWrapper):
    """A transport whose transfers take as long as `links`; `levels` (R,) are the levels of the links to each rank.

    A transfer is complete when the rows of all its levels have arrived; its time starts when the receiver calls
    `receive`, which knows that all senders have begun. `on_transfer` is called with the start and the arrival of each
    transfer, by `time.perf_counter`.
    """

    def __init__(
        self,
        transport: Transport,
        links: Links,
        *,
        levels: IntArray,
        row_bytes: int,
        on_transfer: Callable[[float, float], None] | None = None,
    ) -> None:
        super().__init__(transport)
        self._links = links
        self._levels = levels
        self._row_bytes = row_bytes
        self._on_transfer = on_transfer

    def send(self, outgoing: Any, counts: IntArray) -> None:
        self._send_counts = counts
        self._transport.send(outgoing, counts)

    def receive(self, incoming: Any, counts: IntArray) -> DelayedReceipt:
        receipt = self._transport.receive(incoming, counts)
        arrival = 0.0
        for level, link in self._links.items():
            rows = max(int(each[self._levels == level].sum()) for each in (self._send_counts, counts))
            if rows:
                arrival = max(arrival, link.arrival(rows * self._row_bytes))
        if self._on_transfer is not None:
            self._on_transfer(time.perf_counter(), arrival)
        return DelayedReceipt(receipt, arrival)
