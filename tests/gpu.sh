#!/usr/bin/env bash
# What needs a GPU: bash tests/gpu.sh. The verbs and whole runs on the device, the kernels under compute-sanitizer where
# it is installed, and the figures of `moempi bench gpu`. Several ranks share a GPU where there are more ranks than GPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash jobs/setup.sh ${MOEMPI_EXTRAS:-local} convert cuda test
# shellcheck source=jobs/env.sh
source jobs/env.sh
moempi check
export MOEMPI_TEST_DEVICE=cuda
pytest tests/backend/cuda/test_backend.py tests/backend/cuda/test_run.py tests/model/test_recorded.py "$@"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 python -m pytest -q tests/backend/cuda/test_backend.py
    done
else
    echo "gpu: compute-sanitizer is not installed, skipped"
fi
moempi bench gpu
