#!/usr/bin/env bash
# Builds the kernels of src/cuda for the CPU emulator and tests them against the definition. Needs
# g++ 12 or later, and no part of CUDA.
#   tests/cuda_emu/run.sh [decode|gate|prefill ...]
# SOURCES=dir: a directory that replaces src. CXX, CXXFLAGS: the compiler, and more flags for it.
# The last line is `N passed, N failed`. The exit status is 1 if any failed, crashed or hung.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
sources=$(cd "${SOURCES:-$here/../../src}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build=$work/cuda
mkdir "$build"
ln -s "$sources/gate" "$work/gate"
# The kernels unchanged, beside the emulator's headers, which replace device.cuh and hopper.cuh.
ln -s "$sources"/cuda/*.cu "$sources/cuda/activation.cuh" "$here"/*.cpp "$here"/*.h "$here"/*.cuh "$build"
[ $# -gt 0 ] || set -- decode gate prefill
cd "$build"
flags=(-std=c++20 -O2 -Wall -Wextra -Werror -Wno-unknown-pragmas ${CXXFLAGS:-})
one() {
  "${CXX:-g++}" "${flags[@]}" -o "$1" "$1_test.cpp" && timeout "${LIMIT:-600}" "./$1" > "$1.txt" 2>&1 || echo "exit $?" > "$1.rc"
}
for name in "$@"; do
  one "$name" &
  # Two at a time.
  [ "$(jobs -rp | wc -l)" -lt 2 ] || wait -n
done
wait
passed=0 failed=0
for name in "$@"; do
  if [ -f "$name.txt" ]; then grep -vE '^[0-9]+ passed, [0-9]+ failed$' "$name.txt" || true; fi
  read -r p _ f _rest < <(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$name.txt" 2> /dev/null || echo "0 passed, 1 failed")
  # A test that stopped without a summary, or failed without a count, counts as a failure.
  [ -f "$name.rc" ] && [ "$f" = 0 ] && f=1
  [ -f "$name.rc" ] && echo "$name: $(cat "$name.rc")"
  passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
