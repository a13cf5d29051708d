#!/usr/bin/env bash
# Runs everything that needs a GPU: bash tests/gpu.sh [FOLDER]
#
# The backend's verbs and whole runs on the GPU; the kernels under compute-sanitizer, if it is installed; the figures of
# `moempi bench gpu` and `moempi bench overlap`, into FOLDER (results/gpu) as JSON. More ranks than GPUs share a GPU.
#
# MOEMPI_SETUP=skip uses the packages of .venv, or of the python3 of PATH, where there is no network.
# MOEMPI_EXTRAS="local cuda13" installs for CUDA 13; without `local` the site's MPI is used. With `peers` in it,
# torch and transformers are measured as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck disable=SC2086 # a list of names
[ "${MOEMPI_SETUP:-}" = skip ] || bash jobs/setup.sh ${MOEMPI_EXTRAS:-local cuda12} convert test
# shellcheck source=jobs/env.sh
source jobs/env.sh
folder=${1:-results/gpu}
mkdir -p "$folder"
export PYTHONPATH="$PWD/app${PYTHONPATH:+:$PYTHONPATH}" MOEMPI_TEST_DEVICE=cuda
python3 -c "import cupy, mpi4py, pytest"
python3 -m moempi check
python3 -m pytest -q tests/backend/cuda/test_backend.py tests/backend/cuda/test_cupy_device.py
python3 -m pytest -q tests/backend/cuda/test_run.py tests/model/test_recorded.py

if command -v compute-sanitizer >/dev/null; then
    tools=(memcheck racecheck synccheck) running=()
    trap 'kill "${running[@]}" 2>/dev/null || true' EXIT
    for tool in "${tools[@]}"; do # side by side: they mostly wait for the host
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            python3 -m pytest -q tests/backend/cuda/test_backend.py >"$folder/$tool.txt" 2>&1 &
        running+=($!)
    done
    for number in "${!tools[@]}"; do
        wait "${running[$number]}" || { tail -n 50 "$folder/${tools[$number]}.txt" && exit 1; }
        echo "gpu: ${tools[$number]}: $(grep SUMMARY "$folder/${tools[$number]}.txt")"
    done
else
    echo "gpu: compute-sanitizer is not installed, skipped"
fi

python3 -m moempi bench gpu --parts experts packing small decode prefill --json "$folder/parts.json"
python3 -m moempi bench gpu --parts layer blocks --json "$folder/layers.json"
python3 -m moempi bench overlap --backend cupy --width 7168 --expert-width 2048 --experts 8 --top-k 8 --tokens 1024 \
    --lanes 2 4 --link 0.55 0.9 --json "$folder/overlap.json"
