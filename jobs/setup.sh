#!/usr/bin/env bash
# Makes .venv at the repository's root, or brings it up to date: bash jobs/setup.sh [--unlocked] [EXTRA...]
# EXTRAs are those of pyproject.toml; without any, `local convert`. On a cluster, with the site's MPI loaded:
#     bash jobs/setup.sh convert cuda12
# Installs the versions of jobs/lock/, wheels with the recorded sha256 only. --unlocked takes whatever satisfies
# pyproject.toml instead, for a system that the lock does not serve; that .venv stays unlocked until it is removed.
# Installs nothing when pyproject.toml and the lock are unchanged and the extras are there. PYTHON names the interpreter.
# In each case compiles the bytecode of app/: else every rank of every job would where it cannot be written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/installed.txt # first line: checksum of pyproject.toml and the lock, or `unlocked` and of pyproject.toml; then the extras
sum=$(cat pyproject.toml jobs/lock/*.txt | cksum)
if [ "${1:-}" = --unlocked ] || grep -qs '^unlocked ' "$stamp"; then
    sum="unlocked $(cksum <pyproject.toml)"
fi
[ "${1:-}" != --unlocked ] || shift

[ $# -gt 0 ] || set -- local convert
for extra in "$@"; do
    grep -q "^$extra = \[" pyproject.toml || { echo "setup: pyproject.toml has no extra $extra" >&2; exit 64; }
done

compile_bytecode() { .venv/bin/python -m compileall -qq app || true; } # a checkout may be read-only: its ranks then compile

installed=""
if [ -f "$stamp" ]; then
    installed=$(tail -n +2 "$stamp")
    if [ "$(head -n 1 "$stamp")" = "$sum" ]; then
        missing=$(printf '%s\n' "$@" | grep -Fxv -f <(printf '%s\n' "$installed") || true)
        [ -n "$missing" ] || { compile_bytecode && exit 0; }
    fi
fi

extras=$(printf '%s\n' "$installed" "$@" | sed '/^$/d' | sort -u)
echo "setup: installing moempi with $(echo "$extras" | paste -sd ' ') into .venv"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
pip() { .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"; }
if [ "${sum#unlocked}" = "$sum" ]; then
    # shellcheck disable=SC2046,SC2086 # a list of options
    pip --require-hashes --no-deps --only-binary :all: $(printf -- '-r jobs/lock/%s.txt\n' moempi $extras)
    pip --no-deps --no-build-isolation --editable .
else
    pip --editable ".[$(echo "$extras" | paste -sd ,)]"
fi
# Compiled now for this machine's processor, not by the first job; without a compiler jobs warn.
.venv/bin/python -c 'from moempi.backend.cpu.kernels import load_kernels; load_kernels()' 2>/dev/null || true
compile_bytecode
printf '%s\n' "$sum" "$extras" >"$stamp"
