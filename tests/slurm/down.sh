#!/usr/bin/env bash
# Ends the Slurm that tests/slurm/up.sh started in FOLDER, and only that: bash tests/slurm/down.sh FOLDER
set -euo pipefail
folder=$(readlink -m "$1")
processes=()
for file in "$folder"/run/slurmd.*.pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid; do
    if [ -s "$file" ]; then processes+=("$(<"$file")"); fi
done
[ ${#processes[@]} -gt 0 ] || exit 0

kill "${processes[@]}" 2>/dev/null || true
for process in "${processes[@]}"; do
    for _ in $(seq 50); do
        kill -0 "$process" 2>/dev/null || continue 2
        sleep 0.1
    done
    kill -9 "$process" 2>/dev/null || true
done
