#!/usr/bin/env bash
# Runs jobs/rehearsal.toml with random weights on many ranks and on one, and compares the results bit by bit:
#     bash jobs/rehearse.sh ARCHITECTURE RANKS [--set SECTION.KEY=VALUE]...
# ARCHITECTURE names a file of jobs/arch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
architecture=$1 ranks=$2
shift 2

bash jobs/setup.sh local
# shellcheck source=jobs/env.sh
source jobs/env.sh

weights=weights/$architecture.h5
[ -f "$weights" ] || moempi init "jobs/arch/$architecture.toml" "$weights" --seed 1

job() { mpirun -n "$1" moempi run jobs/rehearsal.toml --set model.weights="$weights" --set output.results="$2" "${@:3}"; }
job 1 "results/$architecture-1.h5"
job "$ranks" "results/$architecture-$ranks.h5" "$@"
moempi compare "results/$architecture-1.h5" "results/$architecture-$ranks.h5"
