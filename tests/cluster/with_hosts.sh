#!/usr/bin/env bash
# Starts four virtual hosts with a Slurm, runs a command beside them and ends them: bash tests/cluster/with_hosts.sh COMMAND...
# Ends with 77 where that is impossible. One run at a time on a machine. It leaves nothing behind, also if it is killed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=/tmp/moempi-cluster

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || ! unshare --net true 2>/dev/null; then
    echo "cluster: skipped, virtual hosts need root, apt-get and network namespaces"
    exit 77
fi
if [ "${CLUSTER_LOCK:-}" != held ]; then # by flock itself: no process that is started here keeps it
    CLUSTER_LOCK=held exec flock --close --nonblock --conflict-exit-code 75 /run bash tests/cluster/with_hosts.sh "$@"
fi
bash jobs/setup.sh local convert test
# shellcheck source=jobs/env.sh
source jobs/env.sh

bash tests/cluster/down.sh "$folder"
trap 'bash tests/cluster/down.sh "$folder"' EXIT
mkdir "$folder"
echo $$ >"$folder/owner"
# shellcheck disable=SC2016 # words of the inner shell
setsid bash -c 'tail --pid="$1" --sleep-interval=0.5 -f /dev/null
    [ "$(cat "$2/owner" 2>/dev/null)" != "$1" ] || exec bash tests/cluster/down.sh "$2"' _ $$ "$folder" >/dev/null 2>&1 &

bash tests/cluster/up.sh "$folder" 4 2
export MOEMPI_CLUSTER=$folder SLURM_CONF=$folder/slurm.conf TMPDIR=$folder/tmp PYTHONPATH=tests
setpriv --pdeathsig KILL "$@"
