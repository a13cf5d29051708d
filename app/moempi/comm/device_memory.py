"""Whether this MPI library can send rows from GPU memory.

Libraries cannot be queried for this reliably, and a library that cannot crashes. So a separate process tries: it sends
rows from one device buffer to another, to itself, with every kind of call that a run makes, and compares them.
"""

import logging
import os
import subprocess
import sys

import numpy as np
from mpi4py import MPI

from moempi.backend.values import Array
from moempi.comm.transports.base import Completion, wait
from moempi.comm.transports.pairwise import RequestGroup
from moempi.config.job import ExchangeSection
from moempi.runtime.world import World

LIMIT_S = 60.0
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PMI2_", "PRTE_", "HYDRA_", "SLURM_", "FLUX_")
KEPT_PREFIXES = ("OMPI_MCA_", "OMPI_ALLOW_")
ROWS = 1 << 16

log = logging.getLogger(__name__)


def takes_device_memory(exchange: ExchangeSection, world: World, *, has_gpu: bool) -> bool:
    """Whether all ranks send rows from device memory: `exchange.buffers`, or for "auto" the results of trials.

    The first rank of each node makes one, and all ranks send from device memory only if every trial succeeds and every
    rank `has_gpu`. Never with checksums or the transport "shared", which need rows on the host. Collective; a trial
    blocks for seconds.
    """
    if exchange.verify or exchange.transport == "shared" or exchange.buffers == "host":
        return False
    own = has_gpu and (exchange.buffers == "device" or world.local_rank > 0 or trial())
    agreed: int = world.comm.allreduce(int(own), MPI.MIN)
    if has_gpu and world.rank == 0:
        log.info("comm buffers are in %s memory", "device" if agreed else "host")
    return bool(agreed)


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
    from moempi.backend.cuda.cupy_device import CupyDevice

    device, sent = CupyDevice(0, pinned=False), np.arange(ROWS, dtype=np.int32)
    outgoing = device.comm_buffer((ROWS,), np.int32)
    device.copy(device.upload(sent), outgoing)
    for start in (start_message, start_alltoallv, start_allgatherv):
        incoming = device.comm_buffer((ROWS,), np.int32)
        device.copy(device.upload(np.zeros_like(sent)), incoming)
        device.record_event().synchronize()
        wait(start(MPI.COMM_SELF, outgoing, incoming))
        if not np.array_equal(device.download(incoming), sent):
            return False
    return True


def start_message(comm: MPI.Intracomm, outgoing: Array, incoming: Array) -> Completion:
    """A message to itself, of the kind of `Pairwise` and of the links between stages."""
    received = comm.Irecv([incoming, MPI.INT32_T], comm.rank)
    return RequestGroup([comm.Isend([outgoing, MPI.INT32_T], comm.rank), received])


def start_alltoallv(comm: MPI.Intracomm, outgoing: Array, incoming: Array) -> Completion:
    """The collective of the transport `Alltoallv` and of tensor groups, in a group of one rank."""
    return comm.Ialltoallv([outgoing, [ROWS], MPI.INT32_T], [incoming, [ROWS], MPI.INT32_T])


def start_allgatherv(comm: MPI.Intracomm, outgoing: Array, incoming: Array) -> Completion:
    """The other collective of tensor groups, in a group of one rank."""
    return comm.Iallgatherv([outgoing, ROWS, MPI.INT32_T], [incoming, [ROWS], MPI.INT32_T])


if __name__ == "__main__":
    sys.exit(not _send_to_self())
