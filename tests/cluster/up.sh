#!/usr/bin/env bash
# Starts virtual hosts on this machine, each with its own network, address, name, processes and /dev/shm, and a real Slurm
# over them: bash tests/cluster/up.sh FOLDER [HOSTS] [CPUS]; needs root. tests/cluster/down.sh FOLDER ends them.
# Everything it writes is in FOLDER: `on HOST COMMAND...` runs a command on a host; export SLURM_CONF=FOLDER/slurm.conf
# for sbatch, srun and scontrol. FOLDER/shared is the file system that the hosts share, each through a mount of its own.
set -euo pipefail
folder=$(readlink -m "$1") hosts=${2:-4} cpus=${3:-2}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
net=10.78.0

if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge libpmix2 iproute2 >/dev/null
fi
# Slurm loads libpmix.so, a name that only the development package brings.
pmix=/usr/lib/$(uname -m)-linux-gnu/pmix2/lib
if [ -e "$pmix/libpmix.so.2" ] && [ ! -e "$pmix/libpmix.so" ]; then
    ln -s libpmix.so.2 "$pmix/libpmix.so"
fi

mkdir -p "$folder"/{shared,host,tmp,state,spool,log,run,munge}
chmod 755 "$folder" # munge wants every folder above its socket to be open to all
chmod 700 "$folder/munge"
ip link add mh-br address 02:00:00:00:00:fe type bridge # of its own: that of a link would go with its host
ip address add "$net.254/24" dev mh-br
ip link set mh-br up

cp /etc/hosts "$folder/etc-hosts"
for host in $(seq "$hosts"); do echo "$net.$host n$host" >>"$folder/etc-hosts"; done
sed "s|@FOLDER@|$folder|g" "$here/on.sh" >"$folder/on"
chmod +x "$folder/on"
for host in $(seq "$hosts"); do bash "$here/host.sh" "$folder" "$host"; done

head -c 128 /dev/urandom >"$folder/munge/munge.key"
chmod 400 "$folder/munge/munge.key"
sed -e "s|@FOLDER@|$folder|g; s|@HOST@|$(hostname -s)|g; s|@HOSTS@|$hosts|g; s|@CPUS@|$cpus|g; s|@NET@|$net|g" \
    "$here/slurm.conf" >"$folder/slurm.conf"
munged --key-file="$folder/munge/munge.key" --socket="$folder/run/munge.sock" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/munge/munged.seed"
export SLURM_CONF=$folder/slurm.conf
slurmctld -f "$SLURM_CONF" -c
for host in $(seq "$hosts"); do "$folder/on" "n$host" slurmd -f "$SLURM_CONF" -N "n$host"; done
for _ in $(seq 1000); do
    [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null)" = "$hosts" ] && exit 0
    sleep 0.1
done
echo "up: the hosts do not come up, see $folder/log" >&2
exit 1
