#!/usr/bin/env bash
# Counts the instructions of the kernels' inner loops for x86-64 and 64-bit ARM, from the compiler's
# assembly, and prints tables.
#
#   scripts/count-instructions.sh
#
# Like scripts/aarch64.sh it needs Debian and root.
set -euo pipefail
cd "$(dirname "$0")/.."

flags=(-- --emit asm -C codegen-units=1 -C debuginfo=0 -C symbol-mangling-version=v0)
scripts/aarch64.sh rustc --locked --release --lib --target x86_64-unknown-linux-gnu "${flags[@]}" >&2
scripts/aarch64.sh rustc --locked --release --lib "${flags[@]}" >&2
. scripts/debian.sh
debian sid rustc
newest() { find "$root/target/$1/release/deps" -name 'candle_swiglu-*.s' -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2; }
python3 scripts/count_instructions.py "$(newest x86_64-unknown-linux-gnu)" "$(newest aarch64-unknown-linux-gnu)"
