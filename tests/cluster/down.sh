#!/usr/bin/env bash
# Ends the virtual hosts that tests/cluster/up.sh started in FOLDER, and only those: bash tests/cluster/down.sh FOLDER
set -euo pipefail
folder=$(readlink -m "$1")
for file in "$folder"/host/*/pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid; do
    [ -s "$file" ] || continue
    read -r process <"$file"
    # A number of an earlier start of the machine may be another process by now.
    if grep -qF -- "$folder" "/proc/$process/cmdline" 2>/dev/null; then
        kill -9 "$process" 2>/dev/null || true
        tail --pid="$process" --sleep-interval=0.05 -f /dev/null
    fi
done
for link in /sys/class/net/mh-*; do
    if [ -e "$link" ]; then ip link delete "${link##*/}" 2>/dev/null || true; fi # one that a dead host had goes by itself
done
group=/sys/fs/cgroup/cpu/moempi-cluster # of a slow host; it is busy until the last of its processes has ended
for _ in {1..20}; do
    if [ ! -d "$group" ] || rmdir "$group" 2>/dev/null; then break; fi
    sleep 0.1
done
rm -rf "$folder"
