#!/usr/bin/env bash
# Sets up and runs everything that needs nothing else: bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash jobs/setup.sh local convert test
# shellcheck source=jobs/env.sh
source jobs/env.sh

ruff check
mypy
lint-imports
pytest -m "not mpi" --ignore=tests/peers "$@"
pytest -m mpi --ignore=tests/peers "$@" # the real program, and rank-wise tests, under mpirun
