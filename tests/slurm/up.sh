#!/usr/bin/env bash
# Starts a real Slurm of virtual nodes on loopback: bash tests/slurm/up.sh FOLDER [NODES] [CPUS], 2 nodes or more.
# Everything it writes is in FOLDER, where tests/slurm/down.sh finds what to end. Then: export SLURM_CONF=FOLDER/slurm.conf
set -euo pipefail
folder=$(readlink -m "$1") nodes=${2:-4} cpus=${3:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
host=$(hostname -s)
port=${SLURM_PORT_BASE:-17800}

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge libpmix2 >/dev/null
fi
# Slurm loads libpmix.so, a name that only the development package brings.
pmix=/usr/lib/$(uname -m)-linux-gnu/pmix2/lib
if [ -e "$pmix/libpmix.so.2" ] && [ ! -e "$pmix/libpmix.so" ]; then
    ln -s libpmix.so.2 "$pmix/libpmix.so"
fi

mkdir -p "$folder"/{state,spool,log,run,munge}
for node in $(seq "$nodes"); do mkdir -p "$folder/tmp/n$node"; done
chmod 755 "$folder"
chmod 700 "$folder/munge"
if [ ! -s "$folder/munge/munge.key" ]; then
    head -c 128 /dev/urandom >"$folder/munge/munge.key"
    chmod 400 "$folder/munge/munge.key"
fi
sed -e "s|@FOLDER@|$folder|g; s|@HOST@|$host|g; s|@NODES@|$nodes|g; s|@CPUS@|$cpus|g" \
    -e "s|@CONTROL_PORT@|$((port + 17))|; s|@FIRST_PORT@|$((port + 201))|; s|@LAST_PORT@|$((port + 200 + nodes))|" \
    "$here/slurm.conf" >"$folder/slurm.conf"
half=$((nodes / 2))
sed -e "s|@HALF@|$half|; s|@NEXT@|$((half + 1))|; s|@NODES@|$nodes|" "$here/topology.conf" >"$folder/topology.conf"

munged --key-file="$folder/munge/munge.key" --socket="$folder/run/munge.sock" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge/munged.seed"
export SLURM_CONF=$folder/slurm.conf
slurmctld -f "$SLURM_CONF" -c
for node in $(seq "$nodes"); do slurmd -f "$SLURM_CONF" -N "n$node"; done
for _ in $(seq 1000); do
    [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "$nodes" ] && exit 0
    sleep 0.1
done
echo "up: the nodes do not come up, see $folder/log" >&2
exit 1
