"""Links of chosen latency and bandwidth, emulated: another transport's rows, kept back until their arrival time."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moempi.arrays import IntArray
from moempi.comm.transports.base import Receipt, Transport


@dataclass(slots=True)
class Link:
    """One rank's link, full duplex, shared by all its lanes: it carries one transfer after another.

    A transfer takes its bytes (the larger of both directions) / `bytes_per_s`, and arrives `latency_s` later.
    `busy_s` adds up the time that the link was in use.
    """

    latency_s: float
    bytes_per_s: float
    free_at: float = 0.0
    busy_s: float = 0.0

    def arrival(self, num_bytes: int) -> float:
        """When a transfer that starts now will have arrived, by `time.perf_counter`."""
        carrying_s = num_bytes / self.bytes_per_s
        self.free_at = max(time.perf_counter(), self.free_at) + carrying_s
        self.busy_s += carrying_s
        return self.free_at + self.latency_s


Links = Mapping[int, Link]
"""The links of a rank by their level, an index into `topology.LEVELS`; rows of other levels take no time of theirs."""


@dataclass(frozen=True, slots=True)
class DelayedReceipt:
    """A request that is complete once its rows are here and its arrival time has come."""

    receipt: Receipt
    arrival: float

    def Test(self) -> bool:  # noqa: N802
        return self.receipt.Test() and time.perf_counter() >= self.arrival

    def Wait(self) -> None:  # noqa: N802
        self.receipt.Wait()
        time.sleep(max(0.0, self.arrival - time.perf_counter()))

    def rows(self) -> tuple[Any, IntArray | None]:
        return self.receipt.rows()

    def release(self) -> None:
        self.receipt.release()


class EmulatedLinks:
    """A transport over a `Link` for each level of links that `links` names; `levels` (R,) are those to each rank.

    A transfer is complete when all its levels' rows have arrived. The clock starts at the receiver. `on_transfer` is
    called with the start and the arrival of each transfer, in seconds of `time.perf_counter`.
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
        self.name = f"{transport.name} over emulated links"
        self._transport = transport
        self._links = links
        self._levels = levels
        self._row_bytes = row_bytes
        self._on_transfer = on_transfer

    def outgoing(self, rows: int) -> Any:
        return self._transport.outgoing(rows)

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> DelayedReceipt:
        pending = self._transport.start(outgoing, send_counts, incoming, recv_counts)
        arrival = 0.0
        for level, link in self._links.items():
            rows = max(int(counts[self._levels == level].sum()) for counts in (send_counts, recv_counts))
            if rows:
                arrival = max(arrival, link.arrival(rows * self._row_bytes))
        if self._on_transfer is not None:
            self._on_transfer(time.perf_counter(), arrival)
        return DelayedReceipt(pending, arrival)
