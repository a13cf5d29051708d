#!/usr/bin/env bash
# The batch scripts under a real Slurm of four virtual nodes, from Debian's packages: bash tests/slurm/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "slurm: skipped, a Slurm for the tests needs root and apt-get"
    exit 0
fi
bash jobs/setup.sh local convert test
# shellcheck source=jobs/env.sh
source jobs/env.sh

folder=$(mktemp -d --tmpdir moempi-slurm.XXXXXX)
trap 'bash tests/slurm/down.sh "$folder"; rm -rf "$folder"' EXIT
bash tests/slurm/up.sh "$folder" 4 2
SLURM_CONF=$folder/slurm.conf pytest -m slurm tests/slurm "$@"
