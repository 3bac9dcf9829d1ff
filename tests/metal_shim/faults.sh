#!/usr/bin/env bash
# Plants faults in copies of swiglu.metal and gate.h, one at a time: run.sh must fail on each.
#
#   tests/metal_shim/faults.sh [PATTERN]     those whose name matches
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
sources=$here/../../src
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
caught=0 missed=0

# name, sed expression
plant() {
    if [[ ! $1 =~ ${pattern} ]]; then return; fi
    rm -rf "$work/src"
    mkdir -p "$work/src/gate" "$work/src/metal"
    local file changed=0
    for file in gate/gate.h metal/swiglu.metal; do
        sed -E "$2" "$sources/$file" > "$work/src/$file"
        cmp -s "$sources/$file" "$work/src/$file" || changed=1
    done
    if [ $changed = 0 ]; then echo "BROKEN  $1: the expression changes nothing"; missed=$((missed + 1)); return; fi
    local status=0
    SOURCES=$work/src "$here/run.sh" --fail-fast > "$work/log" 2>&1 || status=$?
    if [ $status -eq 0 ]; then
        echo "MISSED  $1"
        missed=$((missed + 1))
    elif grep -q 'Werror=switch' "$work/log"; then
        echo "caught  $1: the compiler names the missing case"
        caught=$((caught + 1))
    elif ! grep -q '^FAILED' "$work/log"; then
        echo "BROKEN  $1: does not compile"
        missed=$((missed + 1))
    else
        echo "caught  $1: $(grep -m1 '^FAILED' "$work/log" | cut -c8-120)"
        caught=$((caught + 1))
    fi
}
pattern=${1:-.}

plant "no barrier before the stages are overwritten" '/last step.s stages have been read/d'
plant "no barrier after the stages are written" "/this step's have been written/d"
plant "a barrier that not all threads reach" "s/^( *)(threadgroup_barrier.*this step's)/\1if (simd < 3) \2/"
plant "f16 compiled for bf16" 's/^INSTANTIATE_ALL\(f16, half\)/INSTANTIATE_ALL(f16, bfloat)/'
plant "sums rounded to the dtype" 's/sums\[i\]\[r\] = fma\(a\[i\]\[e\], b\[e\], sums\[i\]\[r\]\)/sums[i][r] = float(T(fma(a[i][e], b[e], sums[i][r])))/'
plant "decode: halves swapped" 's/gate_up_value\(p, bias, column, gate, up\)/gate_up_value(p, bias, column, up, gate)/'
plant "tile: halves swapped" 's/GATED \&\& s == 1/GATED \&\& s == 0/'
plant "tile: up fragments of the wrong feature" 's/sums\[i\]\[j \+ 2 \* GATED\]/sums[i][(j + 1) % 2 + 2 * GATED]/'
plant "tile: no guard of the last k, element by element" 's/inside \&\& k \+ e < end/inside/'
plant "tile: no guard of the last k, whole chunks" 's/inside \&\& k < end/inside/'
plant "tile: no guard of the last row" 's/x_inside\[s\] = m < p.rows;/x_inside[s] = true;/'
plant "tile: no guard of the last column" 's/if \(column >= p.columns\) continue;//'
plant "tile: a column off" 's/sn \* FEATURES \/ 2 \+ j \* 8 \+ at.y \+ e/sn * FEATURES \/ 2 + j * 8 + at.y + (e + 1) % 2/'
plant "tile: rows and columns of a fragment swapped" 's/return uint2\((.*), (\(\(lane.*)\);$/return uint2(\2, \1);/'
plant "tile: the raster's group forgotten" 's/group.z \* RASTER \+ group.x/group.x/'
plant "decode: no guard of the last row" 's/min\(m0 \+ r, p.rows - 1\)/(m0 + r)/'
plant "decode: no guard of the last feature" 's/min\(first \+ i % FEATURES, p.columns - 1\)/(first + i % FEATURES)/'
plant "decode: half of a chunk" 's/v < 4 \/ sizeof\(T\)/v < 1/'
plant "decode: one lane's sum" 's/= simd_sum\(sums\[i\]\[r\]\)/= sums[i][r]/'
plant "bias of gate for up" 's/bias\[p.columns \+ column\]/bias[column]/'
plant "the factor before the bias" 's/if \(p.has_bias\) sum \+= float\(bias\[column\]\);/if (p.has_bias) return sum * p.factor + float(bias[column]);/'
plant "NaN lost in a limit" 's/return g >= limit \? limit : g;/return g < limit ? g : limit;/'
plant "silu(-inf) NaN" 's/return f <= R\(0\) \? -R\(0\) : g \* f;/return g * f;/'
plant "silu(-inf) +0" 's/return f <= R\(0\) \? -R\(0\) : g \* f;/return f <= R(0) ? R(0) : g * f;/'
plant "e^x overflows" 's/t = exp_neg\(absolute\(z\)\)/t = exp_neg(z)/'
plant "denormals of e^x flushed too early" 's/fmax\(n, -151.0f\)/fmax(n, -120.0f)/'
plant "a coefficient of erfc off by 1e-6" 's/0.75528514f/0.75528414f/'
plant "the rounding of a² not put back" 's/-0.5f \* rest, e\)/0.0f, e)/'
plant "a gradient at the limit" 's/INFINITY\) \&\& x >= limit/INFINITY) \&\& x > limit/'
plant "the gate's multiplier left out of the gradient" 's/= m \* \(\(dy/= ((dy/'
plant "an activation without a case" '/case IDENTITY: return/d'
plant "glu: no guard of the tail" 's/if \(i \+ e < columns\) row/row/'
plant "glu: the stride of up for the gate" 's/p.gate_column, g\)/p.up_column, g)/'
plant "dup written over dgate" 's/out \+ ulong\(p.rows\) \* p.columns \+ row/out + row/'

echo "$caught caught, $missed missed"
[ "$missed" -eq 0 ]
