"""Counting: another transport's rows, their bytes and messages added up by the level of link that they pass."""

from typing import Any

import numpy as np

from moempi.arrays import IntArray
from moempi.comm.transports.base import Receipt, Transport
from moempi.layout.topology import LEVELS

Counters = dict[str, int]
"""`<level>_bytes` and `<level>_messages` that a rank sent; a message is all rows of one transfer for one rank."""


def no_counts() -> Counters:
    """All counters, at zero."""
    return {f"{level}_{what}": 0 for level in LEVELS for what in ("bytes", "messages")}


class Counted:
    """A transport whose sent rows are counted; `levels` (R,) are those of the links to each rank."""

    def __init__(self, transport: Transport, counters: Counters, *, levels: IntArray, row_bytes: int) -> None:
        self.name = transport.name
        self._transport = transport
        self._counters = counters
        self._levels = levels
        self._row_bytes = row_bytes

    def outgoing(self, rows: int) -> Any:
        return self._transport.outgoing(rows)

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> Receipt:
        for level, name in enumerate(LEVELS):
            sent = send_counts[self._levels == level]
            self._counters[f"{name}_bytes"] += int(sent.sum()) * self._row_bytes
            self._counters[f"{name}_messages"] += int(np.count_nonzero(sent))
        return self._transport.start(outgoing, send_counts, incoming, recv_counts)
