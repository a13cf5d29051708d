#!/usr/bin/env bash
# Compiles the CPU kernels for AVX-512, AVX2 and NEON, and compares the bits of their results: bash tests/instructions.sh
# NEON runs under qemu. Needs gcc; as root it installs the cross compiler and qemu, else it needs them too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d --tmpdir moempi-instructions.XXXXXX)
trap 'rm -rf "$work"' EXIT

if ! command -v aarch64-linux-gnu-gcc >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "instructions: install gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user" >&2
        exit 69
    fi
    apt-get update -qq && apt-get install -y -qq gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user >/dev/null
fi

kernels=app/moempi/backend/cpu/kernels
run() { # run NAME RUNNER COMPILER OPTION...
    local name=$1 runner=$2
    "${@:3}" -std=gnu11 -Wall -Wextra -Werror -O3 -ffp-contract=off -fno-strict-aliasing -pthread -I"$kernels" -o "$work/$name" \
        tests/backend/cpu/kernel_bits.c "$kernels"/*.c -lm
    $runner "$work/$name" >"$work/$name.txt"
}

run neon "qemu-aarch64 -L /usr/aarch64-linux-gnu" aarch64-linux-gnu-gcc
compared="NEON"
has() { grep -qw "$1" /proc/cpuinfo; }
if has avx2; then
    run avx2 "" gcc -mavx2 -mfma
    compared+=", AVX2"
fi
if has avx512f && has avx512bw && has avx512vl; then
    run avx512 "" gcc -mavx512f -mavx512bw -mavx512vl -mavx2 -mfma
    compared+=", AVX-512"
fi
if has avx512_bf16; then
    run avx512_bf16 "" gcc -mavx512f -mavx512bw -mavx512vl -mavx512bf16 -mavx2 -mfma
    compared+=", AVX512-BF16"
fi
for other in "$work"/*.txt; do
    diff "$work/neon.txt" "$other" || { echo "instructions: $(basename "$other" .txt) has other bits than NEON" >&2; exit 1; }
done
echo "instructions: $(wc -l <"$work/neon.txt") results have the same bits with $compared"
