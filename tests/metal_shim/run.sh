#!/usr/bin/env bash
# Runs the kernels of src/metal/swiglu.metal on the CPU against f64. The same files are compiled as
# C++ with the headers beside this script instead of Metal's. Prints a line per group, then `N
# passed, N failed`. Needs a C++20 compiler (g++ 12, clang++ 15), and no Mac.
#
#   tests/metal_shim/run.sh [--fail-fast | --names]     SOURCES=DIR in the place of src, CXX names the compiler
#
# --fail-fast: only the code as written, up to the first failure. --names: the list for kernels.txt,
# which the tests of src/metal/plan.rs read.
#
# It does not check Metal's own language rules (address spaces, attributes), the arithmetic of the
# GPU, or speed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sources=$(cd "${SOURCES:-$here/../../src}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/metal"
ln -s "$sources/gate" "$work/gate"

# Function constants become variables, arrays in threadgroup memory become objects that detect
# errors, and attributes are removed.
sed -E -e 's/^constant bool (\w+) \[\[function_constant\(.*/static thread_local bool \1;/' \
    -e 's/^( +)threadgroup (.*) (\w+)\[(.*)\];/\1static thread_local shim::Threadgroup<\2, \4> \3;/' \
    -e 's/\[\[[^]]*\]\]//g' "$sources/metal/swiglu.metal" > "$work/metal/swiglu.inc"

flags=(-std=c++20 -O2 -Wall -Wno-unknown-pragmas -Werror=switch -Wno-missing-field-initializers -I"$here" -I"$work/metal" -pthread)
build() { "${CXX:-g++}" "${flags[@]}" "${@:2}" "$here/test.cpp" -o "$work/$1"; }
build test -ffp-contract=off &
built=$!
# Metal may contract a·b + c to fma in other places too, so the bounds must also hold with that.
if [ $# -eq 0 ] && grep -qw fma /proc/cpuinfo 2>/dev/null; then build contracted -ffp-contract=fast -mfma; fi
wait "$built"
if [ $# -eq 0 ] && ! "$work/test" --names | diff - "$here/kernels.txt"; then
    echo "kernels.txt is not the list of kernels: run.sh --names > kernels.txt" >&2
    exit 1
fi
if [ -x "$work/contracted" ]; then
    echo "a·b + c contracted to fma:"
    "$work/contracted"
    echo "as written:"
fi
"$work/test" "$@"
