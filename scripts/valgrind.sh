#!/usr/bin/env bash
# The tests of the kernels under valgrind's memcheck: what AddressSanitizer does not see, above all results that depend on
# memory that nothing was written to (scratch, padding of panels, outputs).
#
#   scripts/valgrind.sh                all unit tests, and tests/forward.rs under every kernel that valgrind's CPU has
#   scripts/valgrind.sh gemm_tests     the unit tests whose names contain this
#
# Valgrind's CPU is its own: 3.19 has AVX2, FMA and F16C, but no AVX-512. Detection asks cpuid, which valgrind answers, so
# it finds avx2 and scalar, and so do the libraries below candle. A few minutes on one core.
set -euo pipefail
cd "$(dirname "$0")/.."

# The path of a test's binary, built.
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
read -ra kernels <<<"$(sed -n 's/.*expected one of \(.*\), found ?.*/\1/p' <<<"$unknown" | head -1 | tr -d ,)"
printf '==> kernels that valgrind can run: %s\n' "${kernels[*]}"
[[ " ${kernels[*]} " == *" scalar "* ]]

printf '\n==> unit tests: each goes through all of them by itself\n'
memcheck "$unit"
for kernel in "${kernels[@]}"; do
    printf '\n==> tests/forward.rs, %s\n' "$kernel"
    CANDLE_SWIGLU_KERNEL="$kernel" memcheck "$forward"
done
