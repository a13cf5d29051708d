#!/usr/bin/env bash
# Sets up and runs everything that needs nothing else: bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v g++ >/dev/null; then # runs the CUDA kernels on the CPU
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "tests: install a C++ compiler (g++)" >&2
        exit 69
    fi
    apt-get update -qq && apt-get install -y -qq g++ >/dev/null
fi
if ! command -v chromium >/dev/null && ! command -v chromium-headless-shell >/dev/null; then # opens reports of plan
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core >/dev/null
    else
        echo "tests: no chromium, so reports are opened in no browser"
    fi
fi
bash jobs/setup.sh local convert sentencepiece parquet zstd kernels test
# shellcheck source=jobs/env.sh
source jobs/env.sh

unset PYTHONDONTWRITEBYTECODE # each of thousands of processes would compile the program again
ruff check
ruff format --check --quiet
python tests/house_rules.py
mypy
lint-imports

claims=$(mktemp -d --tmpdir moempi-tests.XXXXXX) # the files of tests that one of the two processes has begun
tests="python -u '$(command -v pytest)' --ignore=tests/peers -p no:cacheprovider --claims=${claims@Q} ${*@Q}"
python tests/parallel.py "$tests" "$tests"
if [ "$(find "$claims" -name '*.ended' | wc -l)" != 2 ]; then
    echo "tests: a process ended before its last test" >&2
    exit 1
fi
rm -r "$claims"
