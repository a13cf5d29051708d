"""A link of chosen latency and bandwidth, emulated: another transport's rows, kept back until their arrival time."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.parallel.transports.transfer import Pending, Transport

IntArray = npt.NDArray[np.integer]


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


@dataclass(frozen=True, slots=True)
class Arriving:
    """A request that is complete once its rows are here and its arrival time has come."""

    pending: Pending
    arrival: float

    def Test(self) -> bool:  # noqa: N802
        """See `Pending.Test`."""
        return self.pending.Test() and time.perf_counter() >= self.arrival

    def Wait(self) -> None:  # noqa: N802
        """See `Pending.Wait`."""
        self.pending.Wait()
        time.sleep(max(0.0, self.arrival - time.perf_counter()))


class EmulatedLink:
    """A transport over a `Link`; rows from a rank to itself do not use the link. The clock starts at the receiver."""

    def __init__(self, transport: Transport, link: Link, *, rank: int, row_bytes: int) -> None:
        self.name = f"{transport.name} over an emulated link"
        self._transport = transport
        self._link = link
        self._rank = rank
        self._row_bytes = row_bytes

    def outgoing(self, rows: int) -> Any:
        """See `Transport.outgoing`."""
        return self._transport.outgoing(rows)

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> Arriving:
        """See `Transport.start`."""
        travelling = max(int(counts.sum() - counts[self._rank]) for counts in (send_counts, recv_counts))
        pending = self._transport.start(outgoing, send_counts, incoming, recv_counts)
        return Arriving(pending, self._link.arrival(travelling * self._row_bytes))
