#!/usr/bin/env bash
# Makes .venv at the repository's root, or brings it up to date: bash jobs/setup.sh [EXTRA...]
# EXTRAs are those of pyproject.toml; without any, `local convert`. On a cluster, with the site's MPI loaded:
#     bash jobs/setup.sh convert cuda12
# Does nothing when pyproject.toml is unchanged and the extras are there. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

[ $# -gt 0 ] || set -- local convert
for extra in "$@"; do
    grep -q "^$extra = \[" pyproject.toml || { echo "setup: pyproject.toml has no extra $extra" >&2; exit 64; }
done
stamp=.venv/installed.txt # first line: checksum of pyproject.toml; then the extras, one a line
sum=$(cksum <pyproject.toml)

installed=""
if [ -f "$stamp" ]; then
    installed=$(tail -n +2 "$stamp")
    if [ "$(head -n 1 "$stamp")" = "$sum" ]; then
        missing=$(printf '%s\n' "$@" | grep -Fxv -f <(printf '%s\n' "$installed") || true)
        [ -n "$missing" ] || exit 0
    fi
fi

extras=$(printf '%s\n' "$installed" "$@" | sed '/^$/d' | sort -u)
echo "setup: installing moempi with $(echo "$extras" | paste -sd ' ') into .venv"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$(echo "$extras" | paste -sd ,)]"
printf '%s\n' "$sum" "$extras" >"$stamp"
