#!/usr/bin/env bash
# Builds into one folder all that a machine with an NVIDIA GPU needs to test and measure this crate.
# That machine needs no cargo.
#
#     scripts/gpu-suite.sh [FOLDER]      default target/gpu-suite
#
# Run there: OUT=results bash FOLDER/run.sh
#
# The CUDA toolkit is the one that NVCC, CUDA_HOME or PATH name. Otherwise nvcc is downloaded into
# target/cuda-toolkit (scripts/cuda-toolkit.sh).
#
# The folder holds an archive of the tests, the benchmark and the example without symbols, the
# checkpoint of weights/, PyTorch's side of the benchmark, and run.sh, whose head explains it. The
# limit is 60 MB. Records are stored as benches/record/MACHINE/DATE.{csv,txt}.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-target/gpu-suite}

if [ -z "${NVCC:-}" ] && ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
    cargo fetch --locked
    exports=$(scripts/cuda-toolkit.sh target/cuda-toolkit compile)
    eval "$exports"
fi
export CUDA_NVCC_LITE="${CUDA_NVCC_LITE-1}" CUDA_COMPUTE_CAP="${CUDA_COMPUTE_CAP:-90}"

# The programs and their paths, from cargo's messages.
programs=$(cargo build --locked --release --features cuda --test cuda --bench gpu --example llama --example make_checkpoint \
    --message-format=json-render-diagnostics | python3 -c '
import json, sys
wanted, found = {"cuda", "gpu", "llama", "make_checkpoint"}, {}
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] in wanted:
        found[message["target"]["name"]] = message["executable"]
missing = wanted - found.keys()
if missing:
    sys.exit(f"cargo did not build {sorted(missing)}")
for name, path in sorted(found.items()):
    print(name, path)')

rm -rf "$folder"
mkdir -p "$folder/weights"
stripped=$(mktemp -d)
trap 'rm -rf "$stripped"' EXIT
while read -r name path; do strip -o "$stripped/$name" "$path"; done <<<"$programs"
tar -czf "$folder/programs.tar.gz" -C "$stripped" .
cp weights/*.json weights/*.safetensors "$folder/weights/"
cp benches/gpu/run.sh benches/gpu/peers.py "$folder/"
sed -n 's/^\/\/! \{0,1\}//p' benches/gpu/main.rs > "$folder/gpu.md"
{ git rev-parse HEAD && git status --short; } > "$folder/commit.txt" 2>/dev/null || echo unknown > "$folder/commit.txt"

ls -s --block-size=K "$stripped"
du -sh "$folder"/* | sort -h
size=$(du -sm "$folder" | cut -f1)
[ "$size" -le 60 ] || { echo "gpu-suite.sh: expected at most 60 MB in $folder, found $size" >&2; exit 1; }
echo "packed $size MB: copy $folder and run there: OUT=results bash $(basename "$folder")/run.sh"
