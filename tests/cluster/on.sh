#!/usr/bin/env bash
# Template of tests/cluster/up.sh. `on HOST COMMAND...` runs a command on a virtual host, in the current folder; it ends if
# this process is killed.
host=$1
shift
read -r first <"@FOLDER@/host/$host/pid"
export TMPDIR=@FOLDER@/tmp SLURM_CONF=@FOLDER@/slurm.conf
# shellcheck disable=SC2016 # words of the inner shell
exec nsenter --target "$first" --net --uts --mount --ipc --pid -- \
    setpriv --pdeathsig TERM bash -c 'cd "$1" && shift && exec "$@"' _ "$PWD" "$@"
