#!/usr/bin/env bash
# Times and bytes of jobs between virtual hosts, over links of 1 Gbit/s and 100 Mbit/s: bash tests/cluster/figures.sh [RATE...]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/with_hosts.sh" python tests/cluster/figures.py "$@"
