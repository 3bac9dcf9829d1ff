#!/usr/bin/env bash
# Compiles the kernels of src/cuda as build.rs does and checks the machine code; no GPU is needed.
# It prints the registers and the shared memory of every kernel, and fails if
#
# - the compiler warns, or reports that it serializes wgmma (C75xx);
# - a kernel spills registers or has a stack frame;
# - a load of an activation may miss what the previous kernel wrote;
# - a kernel for tensor cores has no HMMA, or on Hopper no HGMMA with TMA;
# - a kernel compiled for sm_90 does not wait for its predecessor.
#
#     scripts/cuda-sass.sh
#
# nvcc (13.0), cuobjdump and nvdisasm must be in PATH, for example those of scripts/cuda-toolkit.sh.
# The script takes about a minute of one core per architecture.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../src/cuda" && pwd)
nvcc=${NVCC:-nvcc}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
failed=0
bad() {
  echo "FAILED $*"
  failed=$((failed + 1))
}

# compile FILE ARCHITECTURE -> $build/FILE.ARCHITECTURE.cubin
compile() {
  local host=()
  [ -z "${NVCC_CCBIN:-}" ] || host=(-ccbin "$NVCC_CCBIN")
  "$nvcc" "${host[@]}" -std=c++17 -O3 "-gencode=arch=compute_$2,code=sm_$2" -cubin -Xptxas -v -o "$build/$1.$2.cubin" "$here/$1.cu" > "$build/log" 2>&1 ||
    { cat "$build/log"; bad "$1.cu for sm_$2 does not compile"; return; }
  if grep -iE 'warning|C75[0-9][0-9]' "$build/log"; then bad "$1.cu for sm_$2: warnings"; fi
}

# resources CUBIN: prints a line `kernel registers stack local shared` for each kernel
resources() {
  cuobjdump -res-usage "$1" 2>&1 | sed -nE 's/^ *Function ([^:]+):.*/\1/p; s/.*REG:([0-9]+) STACK:([0-9]+) SHARED:([0-9]+) LOCAL:([0-9]+).*/\1 \2 \4 \3/p' | paste -d' ' - -
}

# check FILE ARCHITECTURE
check() {
  local cubin=$build/$1.$2.cubin kernel registers stack local shared code
  [ -f "$cubin" ] || return 0
  while read -r kernel registers stack local shared; do
    printf '%-8s %-30s %4d registers %6d B shared\n' "sm_$2" "$kernel" "$registers" "$shared"
    [ "$stack" = 0 ] && [ "$local" = 0 ] || bad "$kernel for sm_$2: stack $stack B, local $local B"
    code=$build/code
    cuobjdump -sass -fun "$kernel" "$cubin" > "$code"
    case $kernel in
      *_mma_*) grep -q HMMA.16816.F32 "$code" || bad "$kernel for sm_$2: no HMMA" ;;
      *_sm90_*) for i in "HGMMA.64x$((2 * ${kernel##*_w}))x16.F32" UTMALDG.2D UTMASTG.2D USETMAXREG; do grep -q "$i" "$code" || bad "$kernel: no $i"; done ;;
    esac
    [ "$2" = 80 ] || grep -q ACQBULK "$code" || bad "$kernel for sm_$2: no griddepcontrol.wait"
    # Only weights may be loaded incoherently: the previous kernel may still write the other inputs.
    # (sm_80 has no such overlap.)
    if [ "$2" != 80 ] && grep 'LDG.*CONSTANT' "$code" | grep -qv 'LDG.E.NA.LTC128B.128.CONSTANT'; then bad "$kernel for sm_$2: incoherent load of an activation"; fi
    if grep -qE 'STL|LDL' "$code"; then bad "$kernel for sm_$2: local memory"; fi
  done < <(resources "$cubin")
}

"$nvcc" --version | grep release
for architecture in 80 90; do
  for file in decode gate; do
    compile "$file" "$architecture"
    check "$file" "$architecture"
  done
done
compile prefill_sm90 90a
check prefill_sm90 90a
echo "$failed failed"
[ "$failed" = 0 ]
