"""Counting: bytes and messages of another transport's sent rows, by the level of the link to the receiver."""

from typing import Any

import numpy as np

from moempi.arrays import IntArray
from moempi.comm.transports.base import Receipt, Transport, TransportWrapper
from moempi.layout.topology import LEVELS

Counters = dict[str, int]
"""`<level>_bytes` and `<level>_messages` that a rank sent; a message is all rows of one transfer for one rank."""


def no_counts() -> Counters:
    """All counters, at zero."""
    return {f"{level}_{what}": 0 for level in LEVELS for what in ("bytes", "messages")}


class Counted(TransportWrapper):
    """A transport that adds each transfer to `counters`; `levels` (R,) are the levels of the links to each rank."""

    def __init__(self, transport: Transport, counters: Counters, *, levels: IntArray, row_bytes: int) -> None:
        super().__init__(transport)
        self._counters = counters
        self._row_bytes = row_bytes
        self._ranks_by_level = {LEVELS[level]: np.flatnonzero(levels == level) for level in np.unique(levels)}

    def start(self, outgoing: Any, send_counts: IntArray, incoming: Any, recv_counts: IntArray) -> Receipt:
        for level, ranks in self._ranks_by_level.items():
            sent = send_counts[ranks]
            self._counters[f"{level}_bytes"] += int(sent.sum()) * self._row_bytes
            self._counters[f"{level}_messages"] += int(np.count_nonzero(sent))
        return self._transport.start(outgoing, send_counts, incoming, recv_counts)
