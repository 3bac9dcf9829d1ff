#!/usr/bin/env bash
# Runs the folder that scripts/gpu-suite.sh has packed. The machine needs an NVIDIA GPU, its driver,
# and the cuBLAS of PyTorch or of the CUDA toolkit.
#
#     OUT=results bash run.sh
#
# 1. facts.txt: the machine, versions, libraries found (ldd), and the clocks every 5 s while timing.
# 2. The tests of tests/cuda, with a device required. At the same time small cases run under
#    memcheck and racecheck of compute-sanitizer (if it is installed), and a checkpoint of random
#    weights with the shape of an 8B model is written.
# 3. results.csv: the Rust benchmark in bf16 (gpu.md explains the columns), and after steps 4 and 5
#    PyTorch (peers.py) in the remaining time. results-f16-f32.csv: the 8B shape in f16 and f32; the
#    floors of many rows are those of bf16.
# 4. ncu.txt: profiles of the kernels by Nsight Compute, if it is installed and PROFILE=1 is set.
# 5. llama.txt: tokens per second of the small checkpoint and of the 8B-shaped one.
#
# log.txt holds all output. The last lines say which steps passed, failed or were skipped; the exit
# status is 1 if a step failed.
#
# BUDGET=s limits the whole run (default 460). After that time no step begins, and the running one
# is ended. TESTS=0, SANITIZE=0, BENCH=0, LLAMA=0 and PEERS=0 omit a part. LAYERS=n is the depth of
# the 8B-shaped model (default 8).
set -u
out=${OUT:-$PWD/out}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")" || exit 1
budget=${BUDGET:-460} scratch=$(mktemp -d) sampler=
trap '[ -z "$sampler" ] || kill "$sampler" 2>/dev/null; rm -rf "$scratch"' EXIT
mkdir -p "$scratch/bin" && tar -xzf programs.tar.gz -C "$scratch/bin" || exit 1
bin=$scratch/bin log=$out/log.txt facts=$out/facts.txt csv=$out/results.csv summary=$scratch/summary
: > "$log" > "$facts" > "$summary"
say() { echo "$*" | tee -a "$log"; }

# step SECONDS NAME COMMAND...: runs a command with a limit of its own within the budget. Its output
# is written to the log and to $scratch/NAME.
step() {
    local limit=$1 name=$2 left=$((budget - SECONDS)) status output=$scratch/${2//\//-}
    shift 2
    if ((left < 15)); then
        say "skipped: $name" | tee -a "$summary"
        return 0
    fi
    ((limit <= left - 5)) || limit=$((left - 5))
    say "==> $name (at $SECONDS s, at most $limit s)"
    timeout -k 5 "$limit" "$@" > "$output" 2>&1
    status=$?
    { echo "==> $name"; cat "$output"; } >> "$log"
    case $status in
        0) echo "passed: $name" >> "$summary" ;;
        124 | 137) say "timed out: $name" | tee -a "$summary" ;;
        *) say "failed: $name (exit $status, at $SECONDS s)" | tee -a "$summary"; grep -E 'panicked|Error|^failures|FAILED' -A3 "$output" | head -40; tail -15 "$output" ;;
    esac
    return $status
}

# ---- 1. facts, libraries
nvidia-smi > "$facts" 2>&1 || { say "no working nvidia-smi"; cat "$facts"; exit 2; }
# cuBLAS and cuRAND are taken from PyTorch, otherwise from the toolkit. The loader finds the
# driver's library by itself or in one of the usual folders.
libraries=$(python3 - 2>/dev/null <<'PY'
import glob, importlib.util, os
spec = importlib.util.find_spec("nvidia")
folders = {os.path.dirname(f) for root in (spec.submodule_search_locations or []) for name in ("cublas", "curand", "cudart", "nvrtc")
           for f in glob.glob(os.path.join(root, "**", f"lib{name}.so.1*"), recursive=True)}
print(":".join(sorted(folders)))
PY
)
export LD_LIBRARY_PATH="${libraries:+$libraries:}/usr/local/cuda/lib64:/usr/local/nvidia/lib64:/usr/lib/x86_64-linux-gnu${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
{
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,mig.mode.current --format=csv
    uname -srm
    nproc
    cat commit.txt
    nvcc --version 2>/dev/null | tail -2
    python3 -c 'import importlib.metadata as m
for name in ("torch", "triton", "nvidia-cublas", "nvidia-cublas-cu12", "liger-kernel"):
    try: print(name, m.version(name))
    except Exception: pass'
    for program in cuda gpu llama; do echo "$program:"; ldd "$bin/$program"; done
} >> "$facts" 2>&1
if grep -q 'not found' "$facts"; then say "failed: libraries are missing"; grep 'not found' "$facts" | sort -u; exit 1; fi
say "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"

# ---- 2. correctness; the steps run concurrently, because none is timed
export CANDLE_SWIGLU_REQUIRE_CUDA=1 RUST_BACKTRACE=0
if [ "${TESTS:-1}" = 1 ]; then
    step 120 "tests" "$bin/cuda" --test-threads=1 &
    step 60 "tests, fused prefill forced" env CANDLE_SWIGLU_CUDA_PREFILL=fused "$bin/cuda" --test-threads=1 any_number_of_rows x_of_any_layout no_less_accurate &
fi
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
if [ "${SANITIZE:-1}" = 1 ] && [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        step 60 "$tool" "$sanitizer" --tool $tool --error-exitcode 9 --print-limit 20 "$bin/cuda" --test-threads=1 --exact \
            forward::x_of_any_layout gate::any_layout forward::weights_of_any_layout &
    done
else say "skipped: compute-sanitizer" | tee -a "$summary"; fi
model=$scratch/8b
if [ "${LLAMA:-1}" = 1 ]; then
    step 100 "checkpoint of 8B's shape" "$bin/make_checkpoint" --preset 8b --layers "${LAYERS:-8}" --out "$model" &
fi
wait
for tool in memcheck racecheck; do grep -sE 'ERROR SUMMARY|RACECHECK SUMMARY|not supported' "$scratch/$tool" | head -3 | tee -a "$log"; done

# ---- 3. speed
query=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active
(while :; do nvidia-smi --query-gpu=$query --format=csv,noheader; sleep 5; done >> "$facts" 2>&1) &
sampler=$!
if [ "${BENCH:-1}" = 1 ]; then
    step 140 "bench" "$bin/gpu" --budget 120 --csv "$csv"
    cp "$scratch/bench" "$out/bench.txt" 2>/dev/null
    step 40 "bench, f16 and f32" "$bin/gpu" --dtypes f16,f32 --shapes 8b --rows 1,4,8,16,32,512 --systems ours,candle,gemms \
        --budget 20 --csv "$out/results-f16-f32.csv"
fi

# ---- 4. profiles of the kernels
if [ "${PROFILE:-0}" = 1 ] && command -v ncu > /dev/null; then
    sections=(--section SpeedOfLight --section MemoryWorkloadAnalysis --section LaunchStats --section Occupancy --section WarpStateStats --section SchedulerStats --section InstructionStats)
    # profile ROWS KERNELS COUNT
    profile() {
        step 30 "ncu, $1 rows, $2" ncu --clock-control none "${sections[@]}" --kernel-name "regex:$2" --launch-count "$3" --kill yes \
            "$bin/gpu" --shapes 8b --rows "$1"
        cat "$scratch/ncu, $1 rows, $2" >> "$out/ncu.txt"
    }
    profile 1 'gate_up|linear' 2
    profile 16 'gate_up|linear' 2
    profile 32 'gate_up|linear' 2
    profile 512 'gate_up_sm90' 1
    profile 4096 'gate_up_sm90' 1
    profile 512 'gate_forward' 1
fi

# ---- 5. a whole model
if [ "${LLAMA:-1}" = 1 ]; then
    prompt="Once upon a time"
    step 30 "llama, weights" "$bin/llama" --model-id weights --prompt "$prompt" --temperature 0 --sample-len 200
    grep -E '^(kernel|device):|token/s' "$scratch/llama, weights" | sed 's/^/weights: /' | tee -a "$out/llama.txt"
    cp weights/tokenizer*.json "$model/" 2>/dev/null
    step 40 "llama, 8B's shape" "$bin/llama" --model-id "$model" --prompt "$prompt" --temperature 0 --sample-len 200
    grep -E '^(kernel|device):|token/s' "$scratch/llama, 8B's shape" | sed "s/^/8b, ${LAYERS:-8} layers: /" | tee -a "$out/llama.txt"
    rm -rf "$model"
fi

if [ "${PEERS:-1}" = 1 ] && [ -s "$csv" ]; then
    left=$((budget - SECONDS - 15))
    export TORCHINDUCTOR_CACHE_DIR="$scratch/inductor" TRITON_CACHE_DIR="$scratch/triton" PYTHONUNBUFFERED=1
    if ((left > 30)); then step "$left" "PyTorch" python3 peers.py "$csv" $((left - 10)); else say "skipped: PyTorch" | tee -a "$summary"; fi
fi
kill "$sampler" 2>/dev/null
sampler=

# ---- the end
say "==> after $SECONDS s"
cat "$summary"
! grep -qE '^(failed|timed out)' "$summary"
