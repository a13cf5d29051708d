#!/usr/bin/env bash
# Strong and weak scaling of one job over numbers of ranks, as one table; on one machine or inside an allocation:
#     bash jobs/scaling.sh JOB.toml PROMPTS.jsonl RANKS... [-- --set SECTION.KEY=VALUE...]
#     salloc --nodes=8 --ntasks-per-node=8 bash jobs/scaling.sh jobs/abacus.toml jobs/abacus.jsonl 8 16 32 64
# Strong: all prompts at every number of ranks. Weak: as many prompts per rank as the largest number of ranks has of all.
set -euo pipefail
jobs=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=jobs/env.sh
source "$jobs/env.sh"
# shellcheck source=jobs/batch.sh
source "$jobs/batch.sh"

job=$1 prompts=$2
shift 2
counts=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    counts+=("$1")
    shift
done
[ $# -eq 0 ] || shift
[ -n "${SLURM_JOB_ID:-}" ] || MOEMPI_LAUNCHER=mpirun
most=$(printf '%s\n' "${counts[@]}" | sort -n | tail -n 1)
lines=$(wc -l <"$prompts")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# tokens_per_s RANKS PROMPTS
tokens_per_s() {
    (SLURM_NTASKS=$1 launch moempi run "$job" --set input.prompts="$2" --set output.results="$folder/r.h5" "${@:3}") 2>"$folder/err" |
        sed -n 's/.*tokens\/s *[^0-9]*\([0-9,.]*\) .*/\1/p' | tr -d , || { cat "$folder/err" >&2; return 1; }
}

printf '%8s %18s %8s %11s %18s %11s\n' ranks 'strong, tokens/s' speedup efficiency 'weak, tokens/s' efficiency
for ranks in "${counts[@]}"; do
    head -n $((lines * ranks / most)) "$prompts" >"$folder/weak.jsonl"
    strong=$(tokens_per_s "$ranks" "$prompts" "$@")
    weak=$(tokens_per_s "$ranks" "$folder/weak.jsonl" "$@")
    echo "$ranks $strong $weak"
done | awk '
    NR == 1 { ranks = $1; strong = $2; weak = $3 }
    {
        more = $1 / ranks
        printf "%8d %18.1f %8.2f %10.1f%% %18.1f %10.1f%%\n", $1, $2, $2 / strong, 100 * $2 / strong / more, $3, 100 * $3 / weak / more
    }'
