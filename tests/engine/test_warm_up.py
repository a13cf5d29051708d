"""After the warm-up, the steps of a run launch no kernel that was not launched before."""

from types import SimpleNamespace

import numpy as np
import pytest
from msgspec import structs

from engine.jobs import make_job
from engine.requests import make_request
from engine.runs import SMALL, Run
from moempi.backend.cuda.backend import CudaBackend
from moempi.config.architecture import Latent
from moempi.engine import warm_up as module
from moempi.engine.warm_up import warm_up
from simt.device import SimtDevice


class WatchedDevice(SimtDevice):
    """A SIMT device with the kernels that were launched."""

    def __init__(self):
        super().__init__()
        self.kernels = set()

    def launch(self, kernel, grid, threads, arguments):
        self.kernels.add(kernel)
        super().launch(kernel, grid, threads, arguments)
