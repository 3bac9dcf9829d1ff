#!/usr/bin/env bash
# Runs the Rust tests of tests/cuda on the driver model (model.h), without a GPU. Arguments go to
# the test program.
#
#   eval "$(scripts/cuda-toolkit.sh DIR none)"; tests/cuda_model/run.sh
#
# FEATURES (default cuda): features of another build, whose compiled candle is then reused.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -f "${CUDA_HOME:-}/lib/stubs/cuda.c" ] || { echo "run.sh: CUDA_HOME is not a toolkit of scripts/cuda-toolkit.sh" >&2; exit 1; }
model=${CARGO_TARGET_DIR:-target}/cuda-model
mkdir -p "$model"

for part in driver kernels; do
    g++ -std=c++20 -O3 -Wall -Wextra -Wno-unused-parameter -fPIC -c "tests/cuda_model/$part.cpp" -o "$model/$part.o"
done
# All functions to which a program may be linked: the model's, and stubs for the others.
for stub in cuda cublas curand; do
    gcc -w -fPIC -fno-builtin -c "$CUDA_HOME/lib/stubs/$stub.c" -o "$model/$stub.o"
    objcopy --weaken "$model/$stub.o"
done
g++ -shared -o "$model/libcuda.so.1" -Wl,-soname,libcuda.so.1 "$model"/{driver,kernels,cuda,cublas,curand}.o
ln -sf libcuda.so.1 "$model/libcublas.so.13"
ln -sf libcuda.so.1 "$model/libcurand.so.10"

# An nvcc that generates no code is enough, because the model only uses names.
export LD_LIBRARY_PATH="$model:$CUDA_HOME/lib/stubs" CANDLE_SWIGLU_REQUIRE_CUDA=1 CUDA_MODEL=1
export CUDA_MODEL_PRODUCTS=$model/products.txt
: > "$CUDA_MODEL_PRODUCTS"
unset CANDLE_SWIGLU_CUDA_SKIP_NVCC
cargo test --locked --features "${FEATURES:-cuda}" --test cuda -- --test-threads=1 "$@"
