#!/usr/bin/env bash
# Runs the tests under AddressSanitizer, which finds accesses beyond a buffer, use after free and
# leaks.
#
#     scripts/asan.sh                  under every kernel of this machine
#     scripts/asan.sh avx2 scalar      under the named kernels
#
# A nightly toolchain is required. std is linked as it is distributed, but its generic code is
# compiled here and therefore checked. BUILD_STD=1 instruments all of std; it needs the component
# rust-src and network access for std's dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."

target=x86_64-unknown-linux-gnu # explicit, so that build scripts and macros are built without the sanitizer
export RUSTFLAGS="-Zsanitizer=address"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}/asan" # a separate directory keeps the usual build
run=(cargo +nightly test --locked --target "$target")
if [ -n "${BUILD_STD:-}" ]; then run+=(-Zbuild-std); fi

printf '\n==> unit tests: each runs all kernels by itself\n'
"${run[@]}" --lib

kernels=("$@")
if [ ${#kernels[@]} -eq 0 ]; then
    # The error for an unknown name lists the kernels.
    unknown=$(CANDLE_SWIGLU_KERNEL='?' "${run[@]}" --test forward the_kernel_has_a_name 2>&1) && exit 1
    read -ra kernels <<<"$(sed -n 's/.*expected one of \(.*\), found ?.*/\1/p' <<<"$unknown" | head -1 | tr -d , | sed 's, plain$,,')"
fi
[ ${#kernels[@]} -gt 0 ]
for kernel in "${kernels[@]}"; do
    printf '\n==> %s\n' "$kernel"
    CANDLE_SWIGLU_KERNEL="$kernel" "${run[@]}" --test forward --test backward --test trained \
        --test golden_blocks --test checkpoint --test bad_input --test properties
done
