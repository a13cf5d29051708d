#!/usr/bin/env bash
# The program between virtual hosts, with real TCP, failures and Slurm: bash tests/cluster/run.sh [PYTEST ARGUMENTS]
# All failures under both launchers: bash tests/cluster/run.sh -m cluster. Ends with 77 where that is impossible.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/with_hosts.sh" \
    pytest -m "cluster and not long" --basetemp=/tmp/moempi-cluster/shared/pytest tests/cluster "$@"
