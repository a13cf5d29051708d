"""GPU memory that the other processes of a node map, and the copies of their rows."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moempi.backend.cuda.device import Device
from moempi.backend.protocol import Event, RowCopy
from moempi.backend.values import Array

COPY_QUEUE = -1
"""The queue of the copies of all lanes, which the copy engines of the GPU work through beside the lanes' kernels."""


class DevicePeerMemory:
    """`protocol.PeerMemory` of a device, for rows of one type."""

    def __init__(self, device: Device, *, row_dtype: npt.DTypeLike) -> None:
        self._device = device
        self._row_dtype = np.dtype(row_dtype)

    def allocate(self, rows: int, width: int) -> Array:
        """Not from a pool, because a handle stands for a whole allocation."""
        return self._device.allocate_shared((rows, width), self._row_dtype)

    def handle(self, rows: Array) -> bytes:
        return self._device.handle(rows)

    def map(self, handle: bytes, rows: int, width: int) -> Array:
        return self._device.map_shared(handle, (rows, width), self._row_dtype)

    def unmap(self, rows: Array) -> None:
        self._device.unmap_shared(rows)

    def copy(self, copies: Sequence[RowCopy], target: Array) -> Event:
        before = self._device.queue
        self._device.use_queue(COPY_QUEUE)
        try:
            for copy in copies:
                self._device.copy_rows(copy, target)
            return self._device.record_event()
        finally:
            self._device.use_queue(before)
