# shellcheck shell=bash
# Sourced by the batch scripts: how ranks are launched inside an allocation, and how a job goes on after its time is over.

jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# USR1 says that the time is nearly over. Until the ranks run it is only noted.
asked_early=
trap 'asked_early=1' USR1

# launch COMMAND...   one process per task of the allocation; MOEMPI_LAUNCHER is srun or mpirun.
launch() {
    if [ "${MOEMPI_LAUNCHER:-srun}" = srun ]; then
        # A step does not inherit the tasks per node of the job, nor ends by itself when one rank dies.
        exec srun --mpi=pmix --ntasks="$SLURM_NTASKS" --kill-on-bad-exit=1 "$@"
    else
        exec mpirun -n "$SLURM_NTASKS" --bind-to none "$@"
    fi
}

# stage_weights   copies $MOEMPI_STAGE to every node's $MOEMPI_SCRATCH (or $TMPDIR); `staged` is then the option that uses
# the copy. A step that sleeps on every node ends with the job, however that ends, and its epilog removes the copy.
staged=()
stage_weights() {
    [ -n "${MOEMPI_STAGE:-}" ] || return 0
    export MOEMPI_STAGED=${MOEMPI_SCRATCH:-${TMPDIR:-/tmp}}/$SLURM_JOB_ID-${MOEMPI_STAGE##*/}
    srun --overlap --mpi=none --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
        --task-epilog="$jobs/unstage.sh" sleep infinity </dev/null >/dev/null 2>&1 &
    local sleeper=$!
    sbcast --force "$MOEMPI_STAGE" "$MOEMPI_STAGED"
    kill -0 "$sleeper" 2>/dev/null || echo "batch: srun starts no step, so $MOEMPI_STAGED stays on the nodes" >&2
    staged=(--set "model.weights=$MOEMPI_STAGED")
}

# progress JOB.toml [OPTION...]   "STATE FINISHED EXIT_CODE" of the job's last run; "none 0 0" before the first.
progress() { moempi state "$@" 2>/dev/null || echo none 0 0; }

# is_own_code CODE   whether CODE is one that moempi ends with, and not a launcher's: all ranks have ended.
is_own_code() { [ "$1" -eq 0 ] || { [ "$1" -ge 64 ] && [ "$1" -le 78 ]; }; }

# requeue REASON
requeue() {
    echo "batch: $1, requeueing"
    scontrol requeue "$SLURM_JOB_ID"
}

# run_job JOB.toml [OPTION...]   runs the job in this allocation. When it ends early with exit code 75 (time over, a
# rank lost) and has finished more requests than before, requeues the batch job, which then continues.
run_job() {
    local state before after code asked
    read -r state before _ < <(progress "$@")
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [ "$state" = finished ]; then
        echo "batch: the results are complete already"
        return 0
    fi
    stage_weights
    if [ -n "$asked_early" ]; then
        requeue "asked to stop before the start"
        return 75
    fi
    launch moempi run "$@" "${staged[@]}" &
    local child=$!
    trap 'kill -USR1 "$child" 2>/dev/null' USR1 # srun and mpirun pass it on to their ranks
    while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done # a signal ends wait, not the child
    trap : USR1
    # A launcher that dies may leave ranks, and a run that was killed on another node counts as running for a while.
    for _ in {1..40}; do
        read -r state after asked _ < <(progress "$@")
        if [ "$state" != running ] || is_own_code "$code"; then break; fi
        sleep 10
    done
    if [ "$code" -ne 0 ] && [ "$asked" = 75 ]; then
        if [ "$after" -gt "$before" ]; then
            requeue "$after requests are finished ($before before)"
            return 75
        fi
        echo "batch: no request was finished since the last start, giving up" >&2
    fi
    return "$code"
}
