#!/usr/bin/env bash
# The tests on 64-bit ARM without such a machine: built across, and run under qemu's user emulation.
#
#   scripts/aarch64.sh                     all suites under every kernel there is for ARM
#   scripts/aarch64.sh test --lib tests    any cargo command
#
# Everything comes from Debian (scripts/sid.sh); needs root. Proves that the results are right, on a CPU with every extension
# that qemu knows, bf16 products among them; says nothing about speed.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/sid.sh

sid_install rustc cargo libstd-rust-dev libstd-rust-dev:arm64 gcc g++ libc6-dev \
    gcc-aarch64-linux-gnu g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

target=aarch64-unknown-linux-gnu
export CARGO_BUILD_TARGET=$target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu"
export TEST_RUNNER=$CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER # for tests that start themselves again
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
export AR_aarch64_unknown_linux_gnu=aarch64-linux-gnu-ar
# Flags for this machine's own compiler would be wrong there.
unset RUSTFLAGS RUSTC RUSTUP_TOOLCHAIN CARGO_BUILD_RUSTFLAGS

if [ $# -gt 0 ]; then
    in_sid cargo "$@"
    exit
fi

suites=(--test forward --test backward --test properties --test golden_blocks)

printf '\n==> examples and benchmarks are checked\n'
in_sid cargo check --locked --examples --benches

printf '\n==> unit tests, and the choice of the kernel: each goes through all kernels by itself\n'
in_sid cargo test --locked --lib --test kernels

export PROPTEST_CASES="${PROPTEST_CASES:-32}"
for kernel in neonbf16 neon scalar; do
    printf '\n==> %s\n' "$kernel"
    CANDLE_SWIGLU_KERNEL=$kernel in_sid cargo test --locked "${suites[@]}"
done
