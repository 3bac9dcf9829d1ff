#!/usr/bin/env bash
# Runs the kernels' tests under valgrind's memcheck. It finds what AddressSanitizer does not:
# results that depend on uninitialized memory (scratch, padding of panels, outputs).
#
#     scripts/valgrind.sh                all unit tests, and tests/forward.rs under every kernel of
#                                        valgrind's CPU
#     scripts/valgrind.sh block_tests    the unit tests whose names contain the argument
#
# Valgrind emulates a CPU of its own: 3.19 has AVX2, FMA and F16C, but no AVX-512. Valgrind answers
# cpuid, so feature detection finds avx2 and scalar, also in the libraries below candle. A run takes
# a few minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/.."

# Builds a test and prints the path of its binary.
binary() { cargo test --locked --no-run --message-format=json "$@" | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'; }
memcheck() { valgrind --quiet --error-exitcode=9 "$@"; }

unit=$(binary --lib)
if [ $# -gt 0 ]; then
    memcheck "$unit" "$@"
    exit
fi
forward=$(binary --test forward)

# The error for an unknown name lists the kernels.
unknown=$(CANDLE_SWIGLU_KERNEL='?' memcheck "$forward" the_kernel_has_a_name 2>&1) && exit 1
read -ra kernels <<<"$(sed -n 's/.*expected one of \(.*\), found ?.*/\1/p' <<<"$unknown" | head -1 | tr -d , | sed 's, plain$,,')"
printf '==> kernels that valgrind supports: %s\n' "${kernels[*]}"
[[ " ${kernels[*]} " == *" scalar "* ]]

printf '\n==> unit tests: each runs all of them by itself\n'
memcheck "$unit"
for kernel in "${kernels[@]}"; do
    printf '\n==> tests/forward.rs, %s\n' "$kernel"
    CANDLE_SWIGLU_KERNEL="$kernel" memcheck "$forward"
done
