"""Whether this MPI moves rows between buffers in a GPU's memory.

No MPI can be asked reliably, and one that does not know such memory dies of it. So a process of its own tries: it
sends rows from one device buffer to another, to itself, and compares them.
"""

import logging
import os
import subprocess
import sys

import numpy as np

from moempi.config.job import ExchangeSection

LIMIT_S = 60.0
LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PMI2_", "PRTE_", "HYDRA_", "SLURM_", "FLUX_")
KEPT = ("OMPI_MCA_", "OMPI_ALLOW_")
ROWS = 1 << 16


def takes_device_memory(exchange: ExchangeSection) -> bool:
    """Whether rows of this job travel from device memory: as the job says, or as a trial shows; blocks for seconds.

    Checksums are made, and rooms shared between processes, on the host only.
    """
    if exchange.verify or exchange.transport == "shared":
        return False
    if exchange.buffers != "auto":
        return exchange.buffers == "device"
    answer = trial()
    logging.getLogger(__name__).info("MPI %s device memory", "takes" if answer else "does not take")
    return answer


def trial() -> bool:
    """Whether a process of its own, outside the job's world, could send rows between device buffers."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS) or name.startswith(KEPT)}
    command = [sys.executable, "-m", __name__]
    try:
        return not subprocess.run(command, env=own, capture_output=True, timeout=LIMIT_S, check=False).returncode
    except subprocess.TimeoutExpired:
        return False


def _send_to_self() -> bool:
    from mpi4py import MPI

    from moempi.backend.cuda.cupy_device import CupyDevice

    device = CupyDevice(0, pinned=False)
    sent, received = device.comm_buffer((ROWS,), np.int32), device.comm_buffer((ROWS,), np.int32)
    sent[:] = device.upload(np.arange(ROWS, dtype=np.int32))
    device.record_event().synchronize()
    receiving = MPI.COMM_SELF.Irecv([received, MPI.INT32_T], 0)
    MPI.COMM_SELF.Isend([sent, MPI.INT32_T], 0).Wait()
    receiving.Wait()
    return bool((device.download(received) == np.arange(ROWS)).all())


if __name__ == "__main__":
    sys.exit(not _send_to_self())
