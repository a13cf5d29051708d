"""The whole program on the SIMT device: `python tests/simt/run.py run JOB.toml ...`, with or without mpirun.

With MOEMPI_SIMT_BUFFERS=device, comm buffers are device memory. With MOEMPI_TEST_DEVICE=cuda the program runs on a GPU.
"""

import os
import sys

import moempi.engine.run as engine
from moempi.backend.cuda.backend import CudaBackend
from moempi.cli import main
from simt.device import SimtDevice


def make_backend(run, **_):
    device = SimtDevice(pinned=os.environ.get("MOEMPI_SIMT_BUFFERS") != "device")
    return CudaBackend(device, precision=run.precision, reproducible=run.reproducible)


if os.environ.get("MOEMPI_TEST_DEVICE") != "cuda":
    engine.make_backend = make_backend

if __name__ == "__main__":
    sys.exit(main())
