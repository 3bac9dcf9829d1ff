#!/usr/bin/env bash
# The library for WebAssembly: type-checked for wasm32-unknown-unknown as it is and with simd128, then its unit tests of the
# kernels run by Node's WASI (wasm32-wasip1), with the kernels `simd128` and `scalar`.
#
#   scripts/wasm-check.sh            all of it
#   scripts/wasm-check.sh check      the type checks alone
#
# Everything comes from Debian (scripts/debian.sh); needs root.
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
