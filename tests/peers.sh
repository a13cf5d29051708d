#!/usr/bin/env bash
# Compares with other implementations (torch, transformers, compressed-tensors, lm-eval), which it installs: bash tests/peers.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash jobs/setup.sh local convert test eval peers
# shellcheck source=jobs/env.sh
source jobs/env.sh
pytest tests/peers "$@"
