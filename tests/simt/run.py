"""The whole program on the SIMT device: `python tests/simt/run.py run JOB.toml ...`, with or without mpirun.

MOEMPI_SIMT_WIRES=device takes wires for device memory.
"""

import os
import sys

import moempi.backend.choice as choice
from moempi.backend.cupy_backend import CupyBackend
from moempi.cli import main
from simt.device import SimtDevice


def make_backend(run, **_):
    device = SimtDevice(pinned=os.environ.get("MOEMPI_SIMT_WIRES") != "device")
    return CupyBackend(device, precision=run.precision, reproducible=run.reproducible)


choice.make_backend = make_backend

import moempi.engine.run as engine  # noqa: E402

engine.make_backend = make_backend

if __name__ == "__main__":
    sys.exit(main())
