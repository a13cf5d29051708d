"""What the launcher said about this process, before MPI starts. Pure: reads a mapping like `os.environ`."""

from collections.abc import Mapping

# The names of the number of processes and of this one's place, the most specific launcher first.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
# The time that the first process has to speak before the others do, when all have the same to say.
GRACE_S = 0.6


def launch_problem(environment: Mapping[str, str], size: int) -> str | None:
    """Say what is wrong when the launcher started another number of processes than the `size` that MPI connects."""
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


def launched_first(environment: Mapping[str, str]) -> bool:
    """Whether this is the first process of its launch, or the only one."""
    for size_name, rank_name in LAUNCHERS:
        if size_name in environment:
            return environment.get(rank_name, "0") == "0"
    return True
