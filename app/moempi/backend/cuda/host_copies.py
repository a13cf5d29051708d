"""Copies between the host and a device."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from moempi.backend.cuda.device import Device
from moempi.backend.protocol import Download
from moempi.backend.values import Array


class HostCopies:
    """Uploads and downloads; while the host waits for one, it calls `progress`."""

    def __init__(self, device: Device, progress: Callable[[], None]) -> None:
        self._device = device
        self._progress = progress

    def upload(self, values: Array) -> Array:
        """Integers become int32, floats float32. An array of the device is returned as it is."""
        if self._device.holds(values):
            return values
        kind = np.int32 if np.issubdtype(values.dtype, np.integer) else np.float32
        return self._device.upload(values.astype(kind, copy=False))

    def download(self, *arrays: Array) -> list[npt.NDArray[Any]]:
        """Copies of all arrays, for which the host waits once."""
        download = self.start_download(*arrays)
        while not (download.event is None or download.event.is_done()):
            self._progress()
            os.sched_yield()
        return download.values()

    def start_download(self, *arrays: Array) -> Download:
        """Submit copies of all arrays, and record one event behind them."""
        memory = [self._device.start_download(values) for values in arrays]
        return Download(self._device.record_event(), memory)
