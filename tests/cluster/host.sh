#!/usr/bin/env bash
# Starts virtual host number N of tests/cluster/up.sh, also again after it was killed: bash tests/cluster/host.sh FOLDER N
set -euo pipefail
folder=$1 host=n$2 net=10.78.0

mkdir -p "$folder/host/$host" "$folder/spool/$host"
rm -f "$folder/host/$host/ready" "$folder/host/$host/pid"
ip link delete "mh-$host" 2>/dev/null || true
# shellcheck disable=SC2016 # words of the inner shell
# Its first process adopts and reaps what others leave; when it is killed, so are all processes of the host.
setsid unshare --net --uts --mount --ipc --pid --fork --kill-child --mount-proc bash -c '
    folder=$1 host=$2
    hostname "$host"
    mount -t tmpfs tmpfs /dev/shm
    mount -t tmpfs tmpfs "$folder/tmp"
    mount --bind "$folder/etc-hosts" /etc/hosts
    mount --bind "$folder/shared" "$folder/shared"
    ip link set lo up
    touch "$folder/host/$host/ready"
    while true; do sleep 1000; done' _ "$folder" "$host" </dev/null >/dev/null 2>&1 &
outer=$!
while [ ! -e "$folder/host/$host/ready" ]; do
    kill -0 "$outer" # fails if the host could not be made
    sleep 0.02
done
read -r first _ <"/proc/$outer/task/$outer/children" || true # no newline at its end
echo "$first" >"$folder/host/$host/pid"
ip link add "mh-$host" type veth peer name eth0 netns "$first"
ip link set "mh-$host" master mh-br up
nsenter --target "$first" --net ip address add "$net.$2/24" dev eth0
nsenter --target "$first" --net ip link set eth0 up
nsenter --target "$first" --net ip route add default via "$net.254"
