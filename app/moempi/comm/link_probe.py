"""Latency and bandwidth of each level of links, measured while all ranks send, and the error of their predictions.

The model: a message costs its sender the latency of the link's level, plus the bytes divided by the level's bandwidth.
An exchange takes as long as its slowest rank.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from mpi4py import MPI

from moempi.arrays import Float64Array, IntArray, aligned_empty
from moempi.config.topology_file import Level, TopologyFile
from moempi.fitting import fit_costs
from moempi.layout.topology import LEVELS, Topology, from_file

ROUNDS = 15
NUM_CALIBRATION = 40
NUM_TRIALS = 20
LEAST_PER_BYTE_S = 1e-12
SMALL, LARGE = 1 << 10, 1 << 20
"""Bytes of the messages of `measure_network`."""


@dataclass(frozen=True, slots=True)
class LinkTrial:
    """An exchange of random sizes: bytes of all ranks, predicted and measured seconds."""

    num_bytes: int
    predicted_s: float
    measured_s: float


def measure(topology: Topology, comm: MPI.Intracomm) -> tuple[TopologyFile, list[LinkTrial]]:
    """Measure the links between the ranks of `comm`, which `topology` locates, then predict other exchanges with them.

    The figures are fitted to NUM_CALIBRATION random exchanges. A level without links has the figures of the previous
    level. The same result on all ranks. Collective, blocks.
    """
    levels = np.array([topology.levels(rank) for rank in range(comm.size)])
    random = np.random.default_rng(comm.size)
    calibration = [_sizes(random, np.isin(levels, _some_levels(random))) for _ in range(NUM_CALIBRATION)]
    seconds = np.array([exchange_s(comm, sizes) for sizes in calibration])
    loads = np.array([_loads(sizes, levels) for sizes in calibration])
    latency_s, per_byte_s = np.split(fit_costs(loads, seconds), 2)
    found: list[Level] = []
    for level, name in enumerate(LEVELS):
        if (levels == level).any():
            bandwidth_gb_s = 1e-9 / max(float(per_byte_s[level]), LEAST_PER_BYTE_S)
            found.append(Level(name, float(latency_s[level]) * 1e6, bandwidth_gb_s))  # type: ignore[arg-type]
        else:
            found.append(Level(name, found[-1].latency_us, found[-1].bandwidth_gb_s))  # type: ignore[arg-type]
    file = TopologyFile(2, tuple(found), topology.nodes, topology.islands, topology.switches)
    trials = []
    for _ in range(NUM_TRIALS):
        sizes = _sizes(random, levels >= 0)
        trials.append(LinkTrial(int(sizes.sum()), predict_s(file, sizes), exchange_s(comm, sizes)))
    return file, trials


def measure_network(comm: MPI.Intracomm) -> tuple[float, float]:
    """Latency (us) and bandwidth (GB/s) of links that are all alike, from messages of two sizes; collective, blocks."""
    between = 1 - np.eye(comm.size, dtype=np.int64)
    small_s, large_s = (exchange_s(comm, num_bytes * between) / (comm.size - 1) for num_bytes in (SMALL, LARGE))
    per_byte_s = max((large_s - small_s) / (LARGE - SMALL), LEAST_PER_BYTE_S)
    return small_s * 1e6, 1e-9 / per_byte_s


def predict_s(file: TopologyFile, sizes: IntArray) -> float:
    """Predicted seconds of an exchange in which rank s sends sizes[s, r] bytes to rank r (R, R).

    A pair with 0 bytes sends no message.
    """
    topology = from_file(file)
    levels = np.array([topology.levels(rank) for rank in range(len(sizes))])
    latency_s = np.array([level.latency_us * 1e-6 for level in file.levels])[levels]
    bytes_per_s = np.array([level.bandwidth_gb_s * 1e9 for level in file.levels])[levels]
    seconds = np.where(sizes > 0, latency_s + sizes / bytes_per_s, 0.0)
    return float(seconds.sum(axis=1).max())


def median_error(trials: Sequence[LinkTrial]) -> float:
    """Median over trials of the relative error |predicted / measured - 1|."""
    return statistics.median(abs(trial.predicted_s / trial.measured_s - 1) for trial in trials)


def _some_levels(random: np.random.Generator) -> list[int]:
    """A random set of one level or more, so that each level is also measured without the others."""
    chosen = [level for level in range(len(LEVELS)) if random.random() < 0.6]
    return chosen or list(range(len(LEVELS)))


def _sizes(random: np.random.Generator, where: npt.NDArray[np.bool_]) -> IntArray:
    """Bytes of a random exchange over the links `where` (R, R): 1 KiB to 1 MiB, 0 over a fifth of the links."""
    sizes = np.exp2(random.uniform(10, 20, where.shape)).astype(np.int64)
    return np.where(where & (random.random(where.shape) < 0.8), sizes, 0)


def _loads(sizes: IntArray, levels: IntArray) -> Float64Array:
    """Messages over each level, then bytes over each level, of the rank that sends most bytes (2 * levels,)."""
    busiest = int(sizes.sum(axis=1).argmax())
    own = [sizes[busiest, levels[busiest] == level] for level in range(len(LEVELS))]
    return np.array([np.count_nonzero(sent) for sent in own] + [sent.sum() for sent in own], float)


def exchange_s(comm: MPI.Intracomm, sizes: IntArray) -> float:
    """Median seconds, on the slowest rank, of an exchange in which rank s sends sizes[s, r] bytes to rank r (R, R).

    Collective, blocks.
    """
    send_counts, recv_counts = sizes[comm.rank], sizes[:, comm.rank]
    outgoing, incoming = (aligned_empty((int(counts.sum()),), np.uint8) for counts in (send_counts, recv_counts))
    outgoing[:] = comm.rank % 256
    taken = []
    for _ in range(ROUNDS + 2):  # the first two open the connections
        comm.Barrier()
        begin = MPI.Wtime()
        comm.Ialltoallv([outgoing, send_counts, MPI.BYTE], [incoming, recv_counts, MPI.BYTE]).Wait()
        taken.append(MPI.Wtime() - begin)
    slowest: Float64Array = np.array(taken[2:])
    comm.Allreduce(MPI.IN_PLACE, slowest, op=MPI.MAX)
    return float(np.median(slowest))
