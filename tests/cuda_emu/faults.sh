#!/usr/bin/env bash
# Plants faults in copies of the kernels, one at a time, and checks that tests/cuda_emu/run.sh
# detects each. About 15 s per fault.
#   tests/cuda_emu/faults.sh [PATTERN]     only faults whose name matches
# The last line is `N caught, N missed`. The exit status is 1 if any was missed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
sources=$here/../../src
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
caught=0 missed=0

# fault NAME TEST FILE PERL: the substitution must change the file
fault() {
  [[ $1 =~ ${pattern:-.} ]] || return 0
  rm -rf "$work/src"
  mkdir "$work/src"
  cp -r "$sources/cuda" "$sources/gate" "$work/src"
  perl -0pi -e "$4" "$work/src/$3"
  if cmp -s "$sources/$3" "$work/src/$3"; then
    echo "NOT PLANTED $1"
    missed=$((missed + 1))
  elif SOURCES=$work/src LIMIT=120 CXXFLAGS="-Wno-error" "$here/run.sh" "$2" > "$work/out.txt" 2>&1; then
    echo "MISSED      $1"
    missed=$((missed + 1))
  elif grep -q 'error:' "$work/out.txt"; then
    echo "NO BUILD    $1"
    missed=$((missed + 1))
  else
    # The first message: a fault, a failed check, or the exit status.
    echo "caught      $1: $(grep -m1 -oE 'FAULT.*|FAILED.*|exit [0-9]+' "$work/out.txt" | cut -c1-80)"
    caught=$((caught + 1))
  fi
}
pattern=${1:-}

fault "decode: wrong token of a lane" decode cuda/decode.cu 's/x \+ size_t\(g\) \* K;/x + size_t(t) * K;/'
fault "decode: no barrier before the sums are read (mma)" decode cuda/decode.cu 's/      sync_block\(\);\n      finish/      finish/'
fault "decode: no barrier before the sums are read (fma)" decode cuda/decode.cu 's/    sync_tile<SPLIT>\(\);\n//g'
fault "decode: the next sums overwrite those that are read" decode cuda/decode.cu 's/      turn \^= TURNS - 1;\n//'
fault "decode: no barrier before the one place of the sums is written again" decode cuda/decode.cu 's/      if constexpr \(TURNS == 1\) sync_block\(\);\n//'
fault "decode: a round's second half is the next round's" decode cuda/decode.cu 's/if \(k % RUN == 0\) k \+= round - RUN;/k += (round - RUN) * chunks \/ 2;/'
fault "decode: sums of a tile added to the next" decode cuda/decode.cu 's/      done\(tile_of_sums\);\n      sums.clear\(\);/      done(tile_of_sums);/'
fault "decode: weights of the first tile again" decode cuda/decode.cu 's/if \(loading.next\(CHUNKS, ROUND, end\)\) a = row/if (loading.next(CHUNKS, ROUND, end) && false) a = row/'
fault "decode: a block takes every tile" decode cuda/decode.cu 's/    tile \+= int\(gridDim.x\);/    tile += 1;/'
fault "decode: f16 multiplied as bf16" decode cuda/decode.cu 's/mma_m16n8k16\(T\(\)/mma_m16n8k16(bf16()/'
fault "decode: gate and up swapped" decode cuda/decode.cu 's/\(half \? w_up : w_gate\)/(half ? w_gate : w_up)/'
fault "decode: no guard of the last feature" decode cuda/decode.cu 's/if \(i < I\) h\[/h[/'
fault "decode: no guard of the last rows of W" decode cuda/decode.cu 's/min\(first \+ f, I - 1\)/(first + f)/'
fault "decode: no guard of the end of K (mma)" decode cuda/decode.cu 's/= k < K \? Piece\{/= true ? Piece{/'
fault "decode: no guard of the end of K (fma)" decode cuda/decode.cu 's/k \+ 32 \* i < K \? p\[k \+ 32 \* i\] : T\(0.0f\)/p[k + 32 * i]/'
fault "decode: no guard of the last token" decode cuda/decode.cu 's/if \(token < M\) emit\(token, l >> 2/emit(token, l >> 2/'
fault "decode: a warp's part of the sum forgotten" decode cuda/decode.cu 's/s < SPLIT; \+\+s/s < (SPLIT > 1 ? SPLIT - 1 : 1); ++s/g'
fault "decode: up's bias is gate's" decode cuda/decode.cu 's/bias_at\(b_up, i\)/bias_at(b_gate, i)/'
fault "decode: activations read before pdl_wait" decode cuda/decode.cu 's/(  if \(steps > 0\) load\(even, 0\);\n)  pdl_wait\(\);\n  pdl_launch\(\);/$1  if (steps > 0) use(even, 0);\n  pdl_wait();\n  pdl_launch();/'
fault "decode: no pdl_wait" decode cuda/decode.cu 's/  pdl_wait\(\);\n  pdl_launch\(\);\n//'
fault "decode: the second chunk of a tile is the first" decode cuda/decode.cu 's/using_.k \+ u \* CHUNK/using_.k/'
fault "decode: the last tile of an even number is lost" decode cuda/decode.cu 's/if \(more\) use\(odd, i \+ 1\);//'
fault "decode: butterfly over the wrong lanes" decode cuda/decode.cu 's/: v\[i \+ D\], D\)/: v[i + D], D == 2 ? 1 : D)/'
fault "decode: 16-byte loads at odd addresses" decode cuda/decode.cu 's/ && on16\(x\) && on16\(rows\[0\]\) && on16\(rows\[2\]\)//'
fault "decode: no factor" decode cuda/decode.cu 's/bias_at\(bias, n\)\) \* factor/bias_at(bias, n))/'
fault "gate: strides not looked at" gate cuda/gate.cu 's/on16\(p\) && stride % LANES<T> == 0/on16(p)/'
fault "gate: no guard of the last store" gate cuda/gate.cu 's/      if \(i < n\) p\[i\] = raw\[i\];/      p[i] = raw[i];/'
fault "gate: no guard of the last load" gate cuda/gate.cu 's/i < n \? p\[i\] : T\(0.0f\)/p[i]/'
fault "gate: up's bias without its column" gate cuda/gate.cu 's/b_up \+ column/b_up/'
fault "gate: a pack is not carried" gate cuda/gate.cu 's/      pack -= per_row;\n//'
fault "gate: gradients swapped" gate cuda/gate.cu 's/g.v\[i\] = gradients.gate;/g.v[i] = gradients.up;/'
fault "gate: dy with gate's stride" gate cuda/gate.cu 's/dy \+ row \* dy_stride/dy + row * gate_stride/'
fault "activation: gradient passes at the limit" gate gate/gate.h 's/limit < R\(INFINITY\) && x >= limit/limit < R(INFINITY) && x > limit/'
fault "activation: NaN lost in the limit" gate gate/gate.h 's/return g >= limit \? limit : g;/return g < limit ? g : limit;/'
fault "activation: up not bounded from below" gate gate/gate.h 's/: x <= -bound \? -bound : x;/: x;/'
fault "activation: -inf times 0" gate gate/gate.h 's/return f <= R\(0\) \? -R\(0\) : g \* f;/return g * f;/'
fault "activation: dgate without m" gate cuda/activation.cuh 's/m \* gate, m \* \(/m * gate, (/'
fault "activation: sigma of the wrong sign" gate cuda/activation.cuh 's/value = z <= R\(0\) \? tq : q;/value = z <= R(0) ? q : tq;/'
fault "activation: GELU coefficient off by 1e-5" gate gate/gate.h 's/0.38713697f/0.38714697f/'
fault "activation: tanh cubic off by 2e-6" gate gate/gate.h 's/R\(0.044715\)/R(0.044717)/'
fault "activation: square of a not corrected" gate gate/gate.h 's/exp = fused\(e, -0.5f \* rest, e\);/exp = e + 0 * rest;/'
fault "activation: a case forgotten" gate gate/gate.h 's/    case GELU_TANH: [^\n]*\n//'
fault "activation: the last case forgotten" decode gate/gate.h 's/    case IDENTITY: [^\n]*\n//'
fault "prefill: out written before it is read (no wait)" prefill cuda/prefill_sm90.cu 's/    if \(leader\) tma_store_wait_read\(\);\n//'
fault "prefill: out written before it is read (no barrier)" prefill cuda/prefill_sm90.cu 's/(tma_store_wait_read\(\);\n)    sync_threads\(1 \+ consumer, 128\);\n/$1/'
fault "prefill: no proxy fence" prefill cuda/prefill_sm90.cu 's/    async_proxy_fence\(\);\n//'
fault "prefill: stored before all have written" prefill cuda/prefill_sm90.cu 's/(async_proxy_fence\(\);\n)    sync_threads\(1 \+ consumer, 128\);\n/$1/'
fault "prefill: ended before the store" prefill cuda/prefill_sm90.cu 's/  if \(leader\) tma_store_wait\(\);\n//'
fault "prefill: a stage freed by one block of two" prefill cuda/prefill_sm90.cu 's/CONSUMERS \* CLUSTER_SIZE\);/CONSUMERS);/'
fault "prefill: a stage freed while wgmma reads it" prefill cuda/prefill_sm90.cu 's/    previous = ring.stage;\n/    previous = (ring.stage + 0);\n    release(previous);\n    previous = -1;\n/; s/  release\(previous\);\n\}/}/'
fault "prefill: wrong phase of an empty stage" prefill cuda/prefill_sm90.cu 's/ring.phase \^ 1\)/ring.phase)/'
fault "prefill: the phase never flips" prefill cuda/prefill_sm90.cu 's/      phase \^= 1;\n//'
fault "prefill: out not swizzled" prefill cuda/prefill_sm90.cu 's/\(PER_BOX == 1 \? piece : piece \^ \(row & 7\)\)/piece/'
fault "prefill: out swizzled where TMA does not" prefill cuda/prefill_sm90.cu 's/\(PER_BOX == 1 \? piece : piece \^ \(row & 7\)\)/((piece ^ row) & 1)/'
fault "prefill: the last box of h not stored" prefill cuda/prefill_sm90.cu 's/box < W \/ S::BOX/box < (W \/ S::BOX + 1) \/ 2/'
fault "prefill: multicast to one block" prefill cuda/prefill_sm90.cu 's/feature, 0b11\)/feature, 0b01)/'
fault "prefill: bytes of a stage miscounted" prefill cuda/prefill_sm90.cu 's/barrier_expect\(full, Size<W>::STAGE_BYTES\)/barrier_expect(full, X_BYTES + Size<W>::HALF_BYTES)/'
fault "prefill: the last strip as high as the others" prefill cuda/prefill_sm90.cu 's/min\(STRIP, down - strip \* STRIP\)/STRIP/'
fault "prefill: gate for up" prefill cuda/prefill_sm90.cu 's/sums\[W \/ 2 \+ FIRST \+ i\]\)/sums[FIRST + i])/'
fault "prefill: x read before pdl_wait" prefill cuda/prefill_sm90.cu 's/(  pdl_wait\(\);\n  pdl_launch\(\);\n)  if \(!leader\) return;\n(  for \(int stage = 0[^\n]*\n)/  if (leader)\n$2$1  if (!leader) return;\n/'
fault "prefill: weights after x" prefill cuda/prefill_sm90.cu 's/ring\{0, 1\}/ring{0, 0}/'
fault "prefill: bias of the next feature" prefill cuda/prefill_sm90.cu 's/bias.up\[feature\]/bias.up[feature + (feature + 1 < bias.I)]/'
fault "prefill: bias beyond I" prefill cuda/prefill_sm90.cu 's/if \(feature < bias.I\)/if (true)/'
fault "prefill: sums not moved down" prefill cuda/prefill_sm90.cu 's/sums\[W \/ 2 \+ i\] = sums\[W \/ 2 \+ i \+ 8\];\n//'

echo "$caught caught, $missed missed"
[ "$missed" = 0 ]
