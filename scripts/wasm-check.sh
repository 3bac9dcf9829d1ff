#!/usr/bin/env bash
# Checks the library for WebAssembly. It is type-checked for wasm32-unknown-unknown without and with
# simd128. Then Node's WASI (wasm32-wasip1) runs the unit tests of the kernels `simd128` and
# `scalar`.
#
#     scripts/wasm-check.sh            all steps
#     scripts/wasm-check.sh check      only the type checks
#
# All tools come from Debian (scripts/debian.sh); root is required.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/debian.sh

debian sid rustc cargo libstd-rust-dev libstd-rust-dev-wasm32 gcc g++ libc6-dev lld wasi-libc nodejs
unset RUSTC RUSTUP_TOOLCHAIN

for flags in "" "-C target-feature=+simd128"; do
    printf '\n==> wasm32-unknown-unknown %s\n' "$flags"
    RUSTFLAGS=$flags inside cargo check --locked --lib --target wasm32-unknown-unknown
done
if [ "${1:-}" = check ]; then exit; fi

printf '\n==> unit tests in WASI, simd128\n'
export CARGO_TARGET_WASM32_WASIP1_LINKER=wasm-ld # Debian has no rust-lld
export CARGO_TARGET_WASM32_WASIP1_RUNNER="node --no-warnings scripts/wasi.mjs"
RUSTFLAGS="-C target-feature=+simd128" inside cargo test --locked --lib --target wasm32-wasip1 cpu::
