#!/usr/bin/env bash
# Writes jobs/lock/, the versions and hashes that setup.sh installs: bash jobs/lock.sh [--upgrade]
# Keeps the versions that still satisfy pyproject.toml; --upgrade takes the newest. Needs a package index.
#
# moempi.txt has what moempi needs to be built and to run, and EXTRA.txt what an extra needs besides. A package has one
# version in all files and for every Python, except the libraries of CUDA 12 and of CUDA 13.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "$*" in "" | --upgrade) ;; *) echo "lock: bash jobs/lock.sh [--upgrade]" >&2; exit 64 ;; esac

work=$(mktemp -d --tmpdir moempi-lock.XXXXXX)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.13.9
read_project() { "$work/venv/bin/python" -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))$1, sep='\n')"; }
read_project '["build-system"]["requires"]' >"$work/build.in"
extras=$(read_project '["project"]["optional-dependencies"]')

lock() { # FILE [OPTION...]
    "$work/venv/bin/uv" pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 --only-binary :all: \
        --no-annotate --custom-compile-command "bash jobs/lock.sh" pyproject.toml "$work/build.in" --output-file "$@"
}

mkdir -p jobs/lock
[ "${1:-}" = --upgrade ] || find jobs/lock -name '*.txt' -exec cat {} + >"$work/all.txt"
# shellcheck disable=SC2046,SC2086 # a list of options
lock "$work/all.txt" $(printf -- '--extra %s\n' $extras | grep -v cuda12)
grep -v '^cuda-toolkit==' "$work/all.txt" >"$work/all-but-cuda.txt"

lock jobs/lock/moempi.txt --generate-hashes --constraints "$work/all.txt" "$@"
# Without what moempi needs on other systems only: an extra may need it on Linux.
shared=$(sed -n "/ ; sys_platform == /d;s/^\([^ #=]*\)==.*/--no-emit-package \1/p" jobs/lock/moempi.txt)
for extra in $extras; do
    versions=$work/all.txt
    [ "$extra" != cuda12 ] || versions=$work/all-but-cuda.txt
    # shellcheck disable=SC2086 # a list of options
    lock "jobs/lock/$extra.txt" --generate-hashes --constraints "$versions" --extra "$extra" $shared "$@"
done
