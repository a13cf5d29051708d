"""Counting: bytes and messages of another transport's sent rows, by the level of the link to the receiver."""

from typing import Any

import numpy as np

from moempi.arrays import IntArray
from moempi.comm.transports.base import Receipt, Transport, TransportWrapper
from moempi.layout.topology import LEVELS

Counters = dict[str, int]
"""`<kind><level>_bytes` and `<kind><level>_messages` that a rank sent; a message is a transfer's rows for one rank.

The kind is one of KINDS: rows to experts and back, rows to the next stage, rows and logits of a tensor group and of
the LM head. Numbers of rows, choices and norms of two hops, batches and sampled tokens are not counted.
"""
TO_EXPERTS, TO_STAGE, IN_TENSOR_GROUP = KINDS = ("", "stage_", "tensor_")


def no_counts() -> Counters:
    """All counters, at zero."""
    return {f"{kind}{level}_{what}": 0 for kind in KINDS for level in LEVELS for what in ("bytes", "messages")}


class Counted(TransportWrapper):
    """A transport that adds each transfer to `counters`; `levels` (R,) are the levels of the links to each rank."""

    def __init__(self, transport: Transport, counters: Counters, *, levels: IntArray, row_bytes: int) -> None:
        super().__init__(transport)
        self._counters = counters
        self._row_bytes = row_bytes
        found = np.flatnonzero(np.bincount(levels)).tolist()  # np.unique would import numpy.ma, 45 ms
        self._ranks_by_level = {LEVELS[level]: np.flatnonzero(levels == level) for level in found}
        self._level = LEVELS[found[0]] if len(found) == 1 else None

    def send(self, outgoing: Any, counts: IntArray) -> None:
        if self._level is not None:
            self._count(self._level, len(outgoing), counts)
        else:
            for level, ranks in self._ranks_by_level.items():
                self._count(level, int(counts[ranks].sum()), counts[ranks])
        self._transport.send(outgoing, counts)

    def receive(self, incoming: Any, counts: IntArray) -> Receipt:
        return self._transport.receive(incoming, counts)

    def _count(self, level: str, rows: int, counts: IntArray) -> None:
        self._counters[f"{TO_EXPERTS}{level}_bytes"] += rows * self._row_bytes
        self._counters[f"{TO_EXPERTS}{level}_messages"] += int(np.count_nonzero(counts))
