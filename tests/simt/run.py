"""The whole program on the SIMT device: `python tests/simt/run.py run JOB.toml ...`, with or without mpirun.

MOEMPI_SIMT_WIRES=device takes wires for device memory. With MOEMPI_TEST_DEVICE=cuda it is the program itself, on a GPU.
"""

import os
import sys

import moempi.engine.run as engine
from moempi.backend.cuda.backend import CudaBackend
from moempi.cli import main
from simt.device import SimtDevice


def make_backend(run, **_):
    device = SimtDevice(pinned=os.environ.get("MOEMPI_SIMT_WIRES") != "device")
    return CudaBackend(device, precision=run.precision, reproducible=run.reproducible)


if os.environ.get("MOEMPI_TEST_DEVICE") != "cuda":
    engine.make_backend = make_backend

if __name__ == "__main__":
    sys.exit(main())
