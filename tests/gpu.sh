#!/usr/bin/env bash
# What needs a GPU: bash tests/gpu.sh. The verbs and whole runs on the device, the kernels under compute-sanitizer where
# it is installed, and the figures of `moempi bench gpu`. Several ranks share a GPU where there are more ranks than GPUs.
# MOEMPI_EXTRAS="local cuda13" installs for CUDA 13, without `local` for the site's MPI. Where there is no network,
# MOEMPI_SETUP=skip uses the packages of .venv, or of the python3 in PATH.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck disable=SC2086 # a list of names
[ "${MOEMPI_SETUP:-}" = skip ] || bash jobs/setup.sh ${MOEMPI_EXTRAS:-local cuda12} convert test
# shellcheck source=jobs/env.sh
source jobs/env.sh
export PYTHONPATH="$PWD/app${PYTHONPATH:+:$PYTHONPATH}"
python3 -c "import cupy, mpi4py, pytest"
python3 -m moempi check
export MOEMPI_TEST_DEVICE=cuda
python3 -m pytest tests/backend/cuda/test_cupy_device.py tests/backend/cuda/test_backend.py tests/backend/cuda/test_run.py tests/model/test_recorded.py "$@"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 1 python3 -m pytest -q tests/backend/cuda/test_backend.py
    done
else
    echo "gpu: compute-sanitizer is not installed, skipped"
fi
python3 -m moempi bench gpu
