#!/usr/bin/env bash
# Runs the C sources, and the CUDA sources on the CPU, on edge sizes under sanitizers: bash tests/sanitize.sh
# Invalid addresses and undefined behaviour in all of them; data races in the flags in shared memory. Needs gcc and g++.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=jobs/env.sh
source jobs/env.sh
export PYTHONPATH="$PWD/app${PYTHONPATH:+:$PYTHONPATH}"
work=$(mktemp -d --tmpdir moempi-sanitize.XXXXXX)
trap 'rm -rf "$work"' EXIT

gcc -g -O2 -fsanitize=thread -Iapp/moempi/comm/transports -o "$work/flags_race" tests/comm/flags_race.c
setarch --addr-no-randomize "$work/flags_race" # some kernels place memory where this sanitizer cannot

options="-g1 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
export CC="env --unset=LD_PRELOAD gcc $options" MOEMPI_SIMT_OPTIONS="$options" XDG_CACHE_HOME=$work
# Leaks are the interpreter's. Its own allocator would hide what lies beyond a block.
export ASAN_OPTIONS=detect_leaks=0:malloc_context_size=2 PYTHONMALLOC=malloc
libraries="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
LD_PRELOAD=$libraries python -c 'from moempi.backend.cpu.kernels import load_kernels as load; raise SystemExit(not load())'
# Of the tests that take longest, those of attention in one precision with a window.
LD_PRELOAD=$libraries python -m pytest -q tests/backend/cpu/test_compiled_edges.py tests/backend/cpu/test_products.py \
    tests/backend/cpu/test_tiles.py tests/backend/cpu/test_fused.py tests/comm/test_shared_flags.py tests/backend/cuda/test_backend.py tests/backend/cuda/test_selection.py tests/backend/cuda/test_kernels.py \
    -k "not (backwards or arrays or nvrtc or registers or 20000 or attention_equals and (float32 or whole))"
