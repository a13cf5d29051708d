"""What the launcher's environment variables say about this process, before MPI starts. Pure: reads a mapping."""

import re
from collections.abc import Mapping

# The variables of the number of processes and of this process's rank, the most specific launcher first.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
# The variables of the number of this host's processes and of this process's number among them.
OF_HOST = (
    ("OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
    ("SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID"),
)
# How long the other ranks wait for rank 0 to print, when every rank has the same error.
GRACE_S = 0.6


def launch_problem(environment: Mapping[str, str], size: int) -> str | None:
    """A message if the launcher started another number of processes than the `size` that MPI connects, else None."""
    for size_name, _ in LAUNCHERS:
        launched = environment.get(size_name, "")
        if launched.isdecimal():
            if int(launched) == size:
                return None
            return (
                f"launched as {launched} processes ({size_name}) but MPI connects {size}; "
                "launch with the mpirun of the MPI that mpi4py uses, or with srun --mpi=pmix"
            )
    return None


def ranks_of_host(environment: Mapping[str, str]) -> int:
    """The processes that the launcher started on this host, at most where hosts differ; 1 if it does not say."""
    for size_name, _ in OF_HOST:
        counts = [int(count) for count in re.findall(r"(?<!x)\b\d+", environment.get(size_name, ""))]  # "4,2(x3)"
        if counts:
            return max(counts)
    return 1


def launched_first_of_host(environment: Mapping[str, str]) -> bool:
    """Whether this process is the first of its launch on this host."""
    return all(environment.get(rank_name, "0") == "0" for _, rank_name in OF_HOST)


def launched_first(environment: Mapping[str, str]) -> bool:
    """Whether this process is rank 0 of its launch, or was started without a launcher."""
    for size_name, rank_name in LAUNCHERS:
        if size_name in environment:
            return environment.get(rank_name, "0") == "0"
    return True
