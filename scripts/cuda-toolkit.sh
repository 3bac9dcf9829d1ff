#!/usr/bin/env bash
# Provides what `cargo build --features cuda` needs on a machine without a GPU and without CUDA.
#
#     scripts/cuda-toolkit.sh DIR [none|compile]
#
# prints `export` lines for eval "$(scripts/cuda-toolkit.sh DIR compile)". The modes are
#
# - none: no download. Makes libraries to link against and an nvcc that writes empty files. This is
#   enough for cargo check and clippy, and for cargo test, where every CUDA test is skipped:
#   LD_LIBRARY_PATH=$CUDA_HOME/lib/stubs cargo test --features cuda
# - compile (default): NVIDIA's nvcc 13.0 from PyPI, pinned, 381 MB on disk. Builds programs for a
#   machine that has a GPU. CUDA_NVCC_LITE=1 at build time omits candle's quantized and MoE kernels,
#   which take most of ten minutes; a call of one then aborts.
#
# g++ and cargo with the dependencies fetched (`cargo fetch`) are required, for `compile` also
# python3 with pip or venv. CUDARC_SRC names cudarc's source if it is not in cargo's registry. A
# second run does only the missing steps.
#
# In both modes the libraries are stubs: they define every function that cudarc declares and return
# "no device". A program linked against them starts on any machine and uses the real libraries where
# the loader finds those first. A program linked against the real cuBLAS would not start here. nvcc
# 13.0 writes PTX 9.0, which drivers from version 580 accept; they would reject the PTX of a later
# nvcc.
set -euo pipefail

fail() { echo "cuda-toolkit.sh: $*" >&2; exit 1; }
[ $# -ge 1 ] && [ $# -le 2 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
mode=${2:-compile}
[ "$mode" = none ] || [ "$mode" = compile ] || fail "unknown mode '$mode': expected none or compile"
command -v gcc >/dev/null || fail "gcc not found (Debian: apt-get install g++)"
mkdir -p "$1" || fail "cannot create $1"
dir=$(cd "$1" && pwd)
root=$dir/cuda
registry=${CARGO_HOME:-$HOME/.cargo}/registry/src
mkdir -p "$root/bin" "$root/lib/stubs" "$root/include" "$dir/front"
ln -sfn lib "$root/lib64"

# ---- nvcc, its headers and the disassemblers
wheels=(nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
    nvidia-cuda-runtime==13.0.96 nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51)

download() {
    local python=${PYTHON:-python3} staging=$dir/staging wheel
    command -v "$python" >/dev/null || fail "$python not found"
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv "$dir/venv" || fail "neither pip nor venv (Debian: apt-get install python3-venv)"
        python=$dir/venv/bin/python
    fi
    rm -rf "$staging"
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.11 \
        --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_27_x86_64 \
        --platform manylinux_2_28_x86_64 -d "$dir/wheels" "${wheels[@]}" >&2 || fail "download from PyPI failed"
    for wheel in "$dir"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$staging"; done
    cp -a "$staging"/nvidia/cu13/. "$root/"
    rm -rf "$staging" "$dir/wheels"
    chmod +x "$root"/bin/* "$root"/nvvm/bin/*
    ln -sfn libcudart.so.13 "$root/lib/libcudart.so"
    "$root/bin/nvcc" --version >&2 || fail "the downloaded nvcc does not run"
    printf '%s\n' "${wheels[@]}" > "$dir/.wheels"
}
if [ "$mode" = compile ] && [ "$(cat "$dir/.wheels" 2>/dev/null)" != "$(printf '%s\n' "${wheels[@]}")" ]; then download; fi

# ---- libraries to link against
cudarc=${CUDARC_SRC:-$(ls -d "$registry"/*/cudarc-0.19.* 2>/dev/null | sort -V | tail -1)}
[ -f "$cudarc/src/driver/sys/mod.rs" ] || fail "cudarc 0.19 is not in $registry: run 'cargo fetch', or set CUDARC_SRC"

# The launch functions that objects of nvcc call and cudarc does not declare.
nvcc_calls=(__cudaRegisterFatBinary __cudaRegisterFatBinaryEnd __cudaUnregisterFatBinary __cudaRegisterFunction __cudaRegisterVar
    __cudaPushCallConfiguration __cudaPopCallConfiguration __cudaInitModule __cudaGetKernel __cudaLaunchKernel)

stub() { # name, soname, folder in cudarc, return value of every function, further functions
    local name=$1 soname=$2 source=$cudarc/src/$3/sys/mod.rs value=$4
    shift 4
    [ -e "$root/lib/stubs/lib$name.so" ] && return
    { grep -oE 'pub unsafe fn [A-Za-z_][A-Za-z0-9_]*\(' "$source" | sed -E 's/pub unsafe fn ([A-Za-z0-9_]+)\(/\1/'
        [ $# -eq 0 ] || printf '%s\n' "$@"; } | sort -u | sed "s/.*/int &(void) { return $value; }/" > "$root/lib/stubs/$name.c"
    gcc -w -shared -fPIC -nostdlib -fno-builtin "-Wl,-soname,$soname" -o "$root/lib/stubs/$soname" "$root/lib/stubs/$name.c"
    ln -sfn "$soname" "$root/lib/stubs/lib$name.so"
}
stub cuda libcuda.so.1 driver 100 # CUDA_ERROR_NO_DEVICE
stub cublas libcublas.so.13 cublas 1
stub cublasLt libcublasLt.so.13 cublaslt 1
stub curand libcurand.so.10 curand 201
stub nvrtc libnvrtc.so.13 nvrtc 1
stub nccl libnccl.so.2 nccl 1
[ -e "$root/lib/libcudart.so" ] || stub cudart libcudart.so.13 runtime 100 "${nvcc_calls[@]}"

# ---- the nvcc that cargo calls: the real one, or one that writes files without code
kernels=$(ls -d "$registry"/*/candle-kernels-0.11.*/src/ffi.rs 2>/dev/null | sort -V | tail -1 || true)
[ -n "$kernels" ] || fail "candle-kernels 0.11 is not in $registry: run 'cargo fetch'"
grep -oE 'pub fn [A-Za-z0-9_]+\(' "$kernels" | sed -E 's/pub fn ([A-Za-z0-9_]+)\(/void abort(void); void \1(void) { abort(); }/' |
    sort -u > "$dir/front/ffi.c"
sed "s#@FRONT@#$dir/front#; s#@ROOT@#$root#" > "$dir/front/nvcc" <<'NVCC'
#!/usr/bin/env bash
# With CUDA_NVCC_LITE=1 objects become stubs, PTX and fatbins stay real. Without a real nvcc
# everything is a stub.
front=@FRONT@ real=@ROOT@/bin/nvcc
[ -x "$real" ] && [ "${CUDA_NVCC_LITE:-0}" = 0 ] && exec "$real" "$@"
out= source= kind= folder=.
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case ${!i} in
        -c) kind=object ;; --lib) kind=library ;; --ptx) kind=ptx ;; -fatbin | --fatbin | -cubin | --cubin) kind=fatbin ;;
        -o) out=${!next} ;; --output-directory) folder=${!next} ;; *.cu) source=${!i} ;;
        --version) kind=version ;; --list-gpu-code) kind=codes ;;
    esac
done
case $kind in
    object) # the stub of this file defines all functions, the others none
        case $source in */moe_gguf.cu) exec gcc -w -fno-builtin -fPIC -c -o "$out" "$front/ffi.c" ;; esac
        exec gcc -w -fPIC -c -x c -o "$out" /dev/null ;;
    library)
        rm -f "$out"
        objects=()
        for arg in "$@"; do case $arg in *.o) objects+=("$arg") ;; esac; done
        exec ar crs "$out" "${objects[@]}" ;;
esac
[ -x "$real" ] && exec "$real" "$@"
case $kind in
    ptx) printf '.version 9.0\n.target sm_80\n.address_size 64\n' > "${out:-$folder/$(basename "${source%.cu}").ptx}" ;;
    fatbin) echo 'no code: written by the nvcc of scripts/cuda-toolkit.sh none' > "$out" ;;
    version) printf 'nvcc: stub\nCuda compilation tools, release 13.0, V13.0.88\n' ;;
    codes) printf 'sm_80\nsm_90\n' ;;
    *) echo "stub nvcc: unsupported arguments: $*" >&2; exit 1 ;;
esac
NVCC
chmod +x "$dir/front/nvcc"

cat <<OUT
export CUDA_HOME='$root' CUDA_PATH='$root' CUDA_COMPUTE_CAP="\${CUDA_COMPUTE_CAP:-90}" CUDARC_CUDA_VERSION=13000
export NVCC='$dir/front/nvcc' NVCC_CCBIN=g++ PATH="$dir/front:$root/bin:\$PATH"
export LIBRARY_PATH="$root/lib/stubs:$root/lib\${LIBRARY_PATH:+:\$LIBRARY_PATH}"
OUT
