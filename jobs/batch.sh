# shellcheck shell=bash
# Sourced by the batch scripts: how ranks are launched inside an allocation, and how a job goes on after its time is over.

jobs=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# USR1 says that the time is nearly over. Until the ranks run it is only noted.
asked_early=
trap 'asked_early=1' USR1

# The nodes that ranks run on, and the ranks on each; empty and 0 as long as they are all of the allocation.
nodes=() per_node=0

# launch COMMAND...   one process per task on `nodes`, or on all of the allocation; MOEMPI_LAUNCHER is srun or mpirun.
launch() {
    local where=() list
    if [ "${MOEMPI_LAUNCHER:-srun}" = srun ]; then
        list=$(IFS=,; echo "${nodes[*]}")
        # The step of a lost node may count as running for minutes.
        if [ -n "$list" ]; then where=(--overlap --nodes="${#nodes[@]}" --nodelist="$list"); fi
        # A step does not inherit the tasks per node of the job, nor ends by itself when one rank dies.
        exec srun --mpi=pmix --ntasks="$ranks" --kill-on-bad-exit=1 "${where[@]}" "$@"
    else
        list=$(printf ",%s:$per_node" "${nodes[@]}")
        if [ ${#nodes[@]} -gt 0 ]; then where=(--host "${list:1}"); fi
        export SLURM_OVERLAP=1 # for the step in which it starts its daemons
        exec mpirun -n "$ranks" --bind-to none "${where[@]}" "$@"
    fi
}

# is_among NODE LIST   whether LIST, host names with a comma before each, has the node, with or without a domain.
is_among() { [[ $2, == *",$1"[,.]* ]]; }

# use_nodes LOST JOB.toml [OPTION...]   sets `nodes` and `ranks` to those of the allocation without LOST, a list with
# commas, as many as before while spare ones are left (MOEMPI_SPARE_NODES); fails, and sets them to all of the allocation,
# if no number of ranks fits the job.
use_nodes() {
    local lost=$1 all=() left=() node spare=${MOEMPI_SPARE_NODES:-0} fewest
    shift
    ranks=$SLURM_NTASKS
    if [ -z "$lost" ] && [ "$spare" -eq 0 ]; then return 0; fi
    mapfile -t all < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for node in "${all[@]}"; do is_among "$node" "$lost" || left+=("$node"); done
    nodes=("${left[@]:0:${#all[@]} - spare}")
    per_node=$((SLURM_NTASKS / ${#all[@]}))
    ranks=$((${#nodes[@]} * per_node)) fewest=$(((${#nodes[@]} - 1) * per_node))
    for ((; ranks > 0 && ranks >= fewest; ranks--)); do
        if moempi run "$@" --dry-run --world "$ranks" --ranks-per-node "$per_node" >/dev/null 2>&1; then return 0; fi
    done
    nodes=() per_node=0 ranks=$SLURM_NTASKS
    return 1
}

# newly_lost HOSTS LOST   the nodes of the allocation among HOSTS and not among LOST, lists with a comma before each name
newly_lost() {
    local node
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
        if is_among "$node" "$1" && ! is_among "$node" "$2"; then printf ',%s' "$node"; fi
    done
}

# unreachable_nodes   the nodes of the allocation whose slurmd does not answer within 2 s, with commas before
unreachable_nodes() {
    local node line address port
    scontrol show hostnames "$SLURM_JOB_NODELIST" | while read -r node; do
        line=$(scontrol --oneliner show node "$node")
        address=$(sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p' <<<"$line")
        port=$(sed -n 's/.* Port=\([0-9]*\).*/\1/p' <<<"$line") # only where it is not the default
        [ -n "$port" ] || port=$(scontrol show config | sed -n 's/^SlurmdPort *= *\([0-9]*\).*/\1/p')
        [ -n "$address" ] || continue
        # shellcheck disable=SC2016 # of the inner shell
        timeout 2 bash -c ': <"/dev/tcp/$1/$2"' _ "$address" "${port:-6818}" 2>/dev/null || printf ',%s' "$node" &
    done
    wait
}

# give_up_nodes LOST   takes nodes, a list with commas, out of the allocation: when Slurm finds that one is down, it would
# end the whole job.
give_up_nodes() {
    local folder node left=()
    for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do is_among "$node" "$1" || left+=("$node"); done
    folder=$(mktemp -d) # where scontrol leaves scripts that set variables
    (cd "$folder" && scontrol update JobId="$SLURM_JOB_ID" NodeList="$(IFS=,; echo "${left[*]}")") >/dev/null || true
    rm -rf "$folder"
}

# end_with_ranks LAUNCHER FILE JOB.toml [OPTION...]   ends a launcher that waits for a lost node after its ranks have
# ended; writes the state in which they ended to FILE. `before` is the state before the launcher's start.
end_with_ranks() {
    local launcher=$1 ended=$2 patience_s last=$!
    shift 2
    trap '[ "$!" = "$last" ] || kill "$!" 2>/dev/null; exit' TERM
    while true; do
        moempi state "$@" --wait >"$ended" 2>/dev/null &
        wait $! || return 0
        # A run that was killed on another node counts as running for a while: this may be the end of the last one.
        [ "$(run_of "$(<"$ended")")" = "$(run_of "$before")" ] || break
    done
    case $(<"$ended") in
        *" lost_hosts="*) patience_s=0.3 ;;
        *" killed: "*) patience_s=2 ;;
        failed*) patience_s=5 ;;
        *) patience_s=60 ;;
    esac
    sleep "$patience_s" &
    wait $!
    kill -KILL "$launcher" 2>/dev/null || return 0
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

# progress JOB.toml [OPTION...]   "STATE FINISHED EXIT_CODE ..." of the job's last run; "none 0 0" before the first. Two runs
# differ in the word run=SLURM_JOB@TIME.
progress() { moempi state "$@" 2>/dev/null || echo none 0 0; }

# run_of STATE   the word of a state that names its run; the whole state if it has none.
run_of() {
    local word
    for word in $1; do
        if [[ $word = run=* ]]; then echo "$word" && return 0; fi
    done
    echo "$1"
}

# is_own_code CODE   whether CODE is one that moempi ends with, and not a launcher's: all ranks have ended.
is_own_code() { [ "$1" -ge 64 ] && [ "$1" -le 78 ]; }

# requeue REASON
requeue() {
    echo "batch: $1, requeueing"
    scontrol requeue "$SLURM_JOB_ID"
}

# start JOB.toml [OPTION...]   runs the job once; sets `code`, that of its launcher, `state`, what became of the run, and
# `begun`, which is empty if no run began.
start() {
    local before=$state
    launch moempi run "$@" "${staged[@]}" &
    local child=$! _
    # As long as the child is a copy of this shell, it may lose a signal.
    for _ in {1..100}; do
        cmp -s "/proc/$$/cmdline" "/proc/$child/cmdline" || break
        sleep 0.1
    done
    trap 'asked_early=1; kill -USR1 "$child" 2>/dev/null || true' USR1 # srun and mpirun pass it on to their ranks
    if [ -n "$asked_early" ]; then kill -USR1 "$child" 2>/dev/null || true; fi # before there was this trap
    local ended
    ended=$(mktemp)
    end_with_ranks "$child" "$ended" "$@" &
    local watch=$!
    # bash may lose a child that ends just as a signal ends `wait`, and then waits for it for ever.
    while kill -0 "$child" 2>/dev/null; do sleep 0.1; done
    code=0
    wait "$child" || code=$?
    trap 'asked_early=1' USR1
    kill "$watch" 2>/dev/null || true
    state=$(<"$ended")
    rm -f "$ended"
    begun=1
    if [[ ${state##* } = lost_hosts=* ]]; then # no time to lose
        if [ "$code" -eq 0 ]; then code=75; fi # mpirun ends with 0 when it loses a node
        return 0
    fi
    # A launcher that ends may leave ranks, which end a moment later; a run that was killed on another node counts as
    # running for a while.
    local pause
    for pause in 0.2 0.5 0.5 1 1 2 5 $(printf '10 %.0s' {1..40}); do
        state=$(progress "$@")
        if [ "${state%% *}" != running ] || is_own_code "$code"; then break; fi
        sleep "$pause"
    done
    if [ "$(run_of "$state")" = "$(run_of "$before")" ]; then
        begun=
    elif [ "${state%% *}" = finished ]; then
        if [ "$code" -eq 0 ]; then read -r _ _ code _ <<<"$state"; fi
        return 0
    fi
    if [ "$code" -eq 0 ]; then code=75; fi # mpirun ends with 0 when it loses a node
}

# start_run JOB.toml [OPTION...]   as start, and once more if the launcher fails before the run begins. What a killed node
# has left, when it is back, keeps Slurm from starting a step of the same number there, and mpirun's daemon from starting
# with the same process number.
start_run() {
    local try
    begun='' code=138 # as if USR1 had ended it
    for try in 1 2; do
        if [ -n "$asked_early" ]; then return 0; fi
        start "$@"
        if [ -n "$begun" ] || is_own_code "$code"; then return 0; fi
        echo "batch: start $try ended with the launcher's code $code and no new state of the run; without PMIX_MCA_plog," \
            "mpirun says why" >&2
    done
}

# run_job JOB.toml [OPTION...]   runs the job in this allocation. When it ends early with exit code 75 and has finished
# more requests than before, it goes on: if nodes were lost, at once on those that are left; otherwise, or if the job does
# not fit them, it requeues the batch job, which then continues.
run_job() {
    local state before after code asked begun lost='' more ranks
    state=$(progress "$@")
    read -r _ before asked _ <<<"$state"
    if [ "${state%% *}" = finished ]; then
        if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && [[ $state == *" run=$SLURM_JOB_ID@"* ]]; then
            echo "batch: the results are complete already"
            return "$asked"
        fi
        before=0 # the run that begins now replaces the results of another job
    fi
    stage_weights
    use_nodes "" "$@" || echo "batch: no number of ranks fits the job if nodes are spared, running on all" >&2
    while true; do
        start_run "$@"
        read -r _ after asked _ <<<"$state"
        if [ -z "$begun" ] && [ -n "$asked_early" ] && ! is_own_code "$code"; then
            requeue "asked to stop before the start"
            return 75
        fi
        if [ "$code" -eq 0 ] || [ "$asked" != 75 ]; then return "$code"; fi
        case ${begun:+$state} in
            *" lost_hosts="*) more=,${state##*=} ;;
            *" killed: "*) more=$(unreachable_nodes) ;; # with a node, so that no rank could say so
            *) more= ;;
        esac
        if [ -n "$more" ]; then more=$(newly_lost "$more" "$lost"); fi # so that each time there are fewer nodes
        lost+=$more
        export MOEMPI_LOST_HOSTS=${more:1}@$EPOCHREALTIME # for the line about the recovery
        if [ -z "$more" ] || ! use_nodes "$lost" "$@"; then break; fi
        give_up_nodes "$lost"
        echo "batch: lost ${more:1}, $after requests are finished ($before before), going on with $ranks ranks"
    done
    if [ "$after" -le "$before" ]; then
        echo "batch: no request was finished since the start, giving up" >&2
        return "$code"
    fi
    requeue "$after requests are finished ($before before)"
    return 75
}
