#!/usr/bin/env bash
# The main job on one machine, from nothing: bash jobs/local.sh [RANKS]     (4 ranks when not said)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ranks=${1:-4}

bash jobs/setup.sh local convert
# shellcheck source=jobs/env.sh
source jobs/env.sh

weights=weights/abacus.h5
newer() { find weights/abacus app/moempi/storage app/moempi/config -newer "$weights" -name '*.[pjs][ysa]*' -type f; }
if [ ! -f "$weights" ] || [ -n "$(newer)" ]; then
    moempi convert weights/abacus "$weights" --force
fi

moempi launch -n "$ranks" run jobs/abacus.toml
moempi show jobs/abacus.toml --first 10
