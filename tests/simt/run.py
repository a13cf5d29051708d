"""The whole program on the SIMT device: `python tests/simt/run.py run JOB.toml ...`, with or without mpirun.

With MOEMPI_SIMT_BUFFERS=device, comm buffers are device memory. MOEMPI_SIMT_FAULT=r:n is a fault of the n-th launch of
the r-th rank. With MOEMPI_TEST_DEVICE=cuda the program runs on a GPU.
"""

import os
import sys

from moempi.backend.cuda.backend import CudaBackend
from moempi.cli import main
from moempi.engine import deployment
from simt.device import SimtDevice


def make_backend(run, *, local_rank, progress, **_):
    rank, launch = os.environ.get("MOEMPI_SIMT_FAULT", "0:0").split(":")
    fault_at = int(launch) if int(rank) == local_rank else 0
    pinned = os.environ.get("MOEMPI_SIMT_BUFFERS") != "device"
    device = SimtDevice(pinned=pinned, fault_at=fault_at, finds_races=False)
    return CudaBackend(
        device, precision=run.precision, reproducible=run.reproducible, capture=run.capture, progress=progress
    )


if os.environ.get("MOEMPI_TEST_DEVICE") != "cuda":
    deployment.make_backend = make_backend

if __name__ == "__main__":
    sys.exit(main())
