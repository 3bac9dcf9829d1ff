#!/bin/sh
# Tokens per second of examples/llama beside other programs:
#   benches/busy.sh MODEL_DIRECTORY [ROUNDS]
# Each round generates 64 tokens with 0, 1 and 2 processes that do nothing but compute.
set -eu
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n 2,4p "$0" >&2; exit 2; }
cargo build --release --quiet --example llama
busy=
trap 'for pid in $busy; do kill "$pid"; done' EXIT
for round in $(seq "${2:-3}"); do
    for count in 0 1 2; do
        busy=
        for _ in $(seq "$count"); do
            sh -c 'while :; do :; done' &
            busy="$busy $!"
        done
        speed=$(target/release/examples/llama --cpu --model-id "$1" --temperature 0 -n 64 \
            --prompt 'The history of the steam engine begins' 2>&1 |
            sed -n 's/.*generated (\([0-9.]*\) token.*/\1/p')
        for pid in $busy; do kill "$pid"; done
        busy=
        echo "round $round, $count busy: $speed token/s"
    done
done
