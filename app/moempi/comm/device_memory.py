"""Whether this MPI library can send rows from GPU memory.

Libraries cannot be queried for this reliably, and a library that cannot crashes. So a separate process tries: it sends
rows from one device buffer to another, to itself, and compares them.
"""

import logging
import os
import subprocess
import sys

import numpy as np

from moempi.config.job import ExchangeSection

LIMIT_S = 60.0
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PMI2_", "PRTE_", "HYDRA_", "SLURM_", "FLUX_")
KEPT_PREFIXES = ("OMPI_MCA_", "OMPI_ALLOW_")
ROWS = 1 << 16


def takes_device_memory(exchange: ExchangeSection) -> bool:
    """Whether this job sends rows from device memory: `exchange.buffers`, or for "auto" the result of a trial.

    Never with checksums or the transport "shared", which need rows on the host. A trial blocks for seconds.
    """
    if exchange.verify or exchange.transport == "shared":
        return False
    if exchange.buffers != "auto":
        return exchange.buffers == "device"
    succeeded = trial()
    logging.getLogger(__name__).info("MPI %s device memory", "takes" if succeeded else "does not take")
    return succeeded


def trial() -> bool:
    """Whether a separate process, outside the job's world, can send from device memory; blocks for seconds."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(KEPT_PREFIXES) or not name.startswith(LAUNCHER_PREFIXES)
    }
    command = [sys.executable, "-m", __name__]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=LIMIT_S, check=False)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False


def _send_to_self() -> bool:
    from mpi4py import MPI

    from moempi.backend.cuda.cupy_device import CupyDevice

    device = CupyDevice(0, pinned=False)
    sent, received = device.comm_buffer((ROWS,), np.int32), device.comm_buffer((ROWS,), np.int32)
    sent[:] = device.upload(np.arange(ROWS, dtype=np.int32))
    device.record_event().synchronize()
    request = MPI.COMM_SELF.Irecv([received, MPI.INT32_T], 0)
    MPI.COMM_SELF.Isend([sent, MPI.INT32_T], 0).Wait()
    request.Wait()
    return bool((device.download(received) == np.arange(ROWS)).all())


if __name__ == "__main__":
    sys.exit(not _send_to_self())
