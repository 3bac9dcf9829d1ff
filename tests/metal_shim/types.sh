#!/usr/bin/env bash
# Checks the types of src/metal/swiglu.metal with clang, including Metal's address spaces, which
# run.sh does not check. Metal is C++14 with extensions. Attributes are parsed but have no effect,
# and casts between address spaces are accepted. Needs clang++ (15 or newer), and no Mac.
#
#   tests/metal_shim/types.sh     SOURCES=DIR in the place of src, CLANG names the compiler
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source=$(cd "${SOURCES:-$here/../../src}" && pwd)/metal/swiglu.metal
clang=${CLANG:-$(compgen -c clang++ | sort -uV | tail -n 1)}
[ -n "$clang" ] || { echo "types.sh: no clang++" >&2; exit 1; }
# Arrays in threadgroup memory are local variables in Metal and static here. clang constructs
# vectors with braces.
sed -E -e 's/^( +)threadgroup (.*\];)/\1static threadgroup \2/' -e 's/vec<T, 4>\((T\(src.*)\);/vec<T, 4>{\1};/' "$source" |
    "$clang" -x c++ -std=c++14 -fsyntax-only -Wall -Wextra -Werror -Wno-unknown-attributes -Wno-ignored-attributes \
        -Wno-c++17-extensions -Wno-sign-compare -Wno-unused-function -Wno-unused-const-variable -I"$here/types" -I"$(dirname "$source")" -
echo "types.sh: the types of $(basename "$source") are sound"
