#!/usr/bin/env bash
# Runs the tests for 64-bit ARM on an x86-64 machine: cross-compiled, under qemu's user emulation.
#
#     scripts/aarch64.sh                     all suites under every ARM kernel
#     scripts/aarch64.sh quick               unit tests (CI)
#     scripts/aarch64.sh prepare             installs the packages from Debian
#     scripts/aarch64.sh test --lib tests    any cargo command
#
# All tools come from Debian (scripts/debian.sh); root is required. qemu's CPU has every extension
# that qemu supports, including bf16 products. The run checks results, not speed.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/debian.sh

debian sid rustc cargo libstd-rust-dev libstd-rust-dev:arm64 gcc g++ libc6-dev \
    gcc-aarch64-linux-gnu g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user

target=aarch64-unknown-linux-gnu
export CARGO_BUILD_TARGET=$target
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu max -L /usr/aarch64-linux-gnu"
export TEST_RUNNER=$CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER # for tests that run their own binary
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc CXX_aarch64_unknown_linux_gnu=aarch64-linux-gnu-g++
export AR_aarch64_unknown_linux_gnu=aarch64-linux-gnu-ar
# Flags for the compiler of this machine do not apply to the target.
unset RUSTFLAGS RUSTC RUSTUP_TOOLCHAIN CARGO_BUILD_RUSTFLAGS

# Unit tests and tests/kernels.rs run all kernels by themselves.
all=(--lib) suites=(--test forward --test golden_blocks) kernels=(neonbf16 neon)
case "${1:-}" in
    prepare)
        inside true
        exit
        ;;
    quick)
        inside cargo test --locked --lib
        exit
        ;;
    "")
        all+=(--test kernels) suites+=(--test backward --test properties) kernels+=(scalar)
        printf '\n==> cargo check of examples and benchmarks\n'
        inside cargo check --locked --examples --benches
        ;;
    *)
        inside cargo "$@"
        exit
        ;;
esac

printf '\n==> %s\n' "${all[*]}"
inside cargo test --locked "${all[@]}" "${suites[@]}" --no-run
inside cargo test --locked "${all[@]}"

export PROPTEST_CASES="${PROPTEST_CASES:-32}"
for kernel in "${kernels[@]}"; do
    printf '\n==> %s\n' "$kernel"
    CANDLE_SWIGLU_KERNEL=$kernel inside cargo test --locked "${suites[@]}"
done
