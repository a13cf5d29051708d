#!/usr/bin/env bash
# Kills a host during the shipped job, many times, and prints how long it takes to go on: bash tests/cluster/recovery.sh [TIMES]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/with_hosts.sh" python tests/cluster/recovery.py "${1:-20}"
