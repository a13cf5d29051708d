#!/usr/bin/env bash
# Runs everything that needs a GPU: bash tests/gpu.sh [FOLDER [tests|sanitizers|figures]...]
#
# tests       the backend's verbs and whole runs on the GPU, side by side
# sanitizers  the kernels under compute-sanitizer, if it is installed
# figures     `moempi bench gpu` and `moempi bench overlap`, one after another
# Without a name all three run, first the tests and the sanitizers together. Logs and figures (JSON) are written to
# FOLDER (results/gpu). More ranks than GPUs share a GPU.
#
# MOEMPI_SETUP=skip uses the packages of .venv, or of the python3 of PATH, where there is no network.
# MOEMPI_EXTRAS="local cuda13" installs for CUDA 13; without `local` the site's MPI is used. With `peers` in it,
# torch and transformers are measured as well.
set -euo pipefail
folder=${1:-results/gpu}
parts=" ${*:2} "
[ "$parts" != "  " ] || parts=" tests sanitizers figures "
for part in $parts; do
    if [[ " tests sanitizers figures " != *" $part "* || " tests sanitizers figures " = *" $folder "* ]]; then
        echo "gpu: usage: bash tests/gpu.sh [FOLDER [tests|sanitizers|figures]...]" >&2
        exit 64
    fi
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# shellcheck disable=SC2086 # a list of names
[ "${MOEMPI_SETUP:-}" = skip ] || bash jobs/setup.sh ${MOEMPI_EXTRAS:-local cuda12} convert test
# shellcheck source=jobs/env.sh
source jobs/env.sh
mkdir -p "$folder"
export PYTHONPATH="$PWD/app${PYTHONPATH:+:$PYTHONPATH}" MOEMPI_TEST_DEVICE=cuda
python3 -c "import cupy, mpi4py, pytest"

names=() running=()
trap 'kill "${running[@]}" 2>/dev/null || true' EXIT

# start NAME COMMAND...   in the background, with its output in FOLDER/NAME.txt
start() {
    "${@:2}" >"$folder/$1.txt" 2>&1 &
    names+=("$1") running+=($!)
}

# finish   wait for what was started, and print the last line of each
finish() {
    local failed=0 number name
    for number in "${!names[@]}"; do
        name=${names[$number]}
        if wait "${running[$number]}"; then
            echo "gpu: $name: $(tail -n 1 "$folder/$name.txt")"
        else
            echo "gpu: $name failed:" && tail -n 50 "$folder/$name.txt" && failed=1
        fi
    done
    names=() running=()
    return "$failed"
}

if [[ $parts = *" tests "* ]]; then
    python3 -m moempi check
    start verbs python3 -m pytest -q tests/backend/cuda/test_backend.py tests/backend/cuda/test_selection.py tests/backend/cuda/test_cupy_device.py \
        tests/backend/cuda/test_captured_attention.py
    start runs python3 -m pytest -q tests/backend/cuda/test_run.py
    start exchange python3 -m pytest -q tests/comm/test_cuda_ipc.py
    start recorded python3 -m pytest -q tests/model/test_recorded.py
fi
if [[ $parts = *" sanitizers "* ]]; then
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck; do
            start "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
                python3 -m pytest -q tests/backend/cuda/test_backend.py
        done
    else
        echo "gpu: compute-sanitizer is not installed, skipped"
    fi
fi
finish
if [[ $parts = *" figures "* ]]; then
    python3 -m moempi bench gpu --parts experts packing small decode prefill preemption --json "$folder/parts.json"
    python3 -m moempi bench gpu --parts layer blocks --json "$folder/layers.json"
    python3 -m moempi bench gpu --parts layer --capture --json "$folder/layers_captured.json"
    layers=(--backend cupy --width 7168 --expert-width 2048 --experts 8 --top-k 8 --tokens 1024 --link 0.55 0.9)
    python3 -m moempi bench overlap "${layers[@]}" --lanes 2 4 --json "$folder/overlap.json"
    for transport in alltoallv cuda_ipc; do
        mpirun -n 2 python3 -m moempi bench overlap "${layers[@]}" --lanes 2 --transport "$transport" \
            --json "$folder/overlap_2_ranks_$transport.json"
    done
fi
