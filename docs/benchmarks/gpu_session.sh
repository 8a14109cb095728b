#!/usr/bin/env bash
# A quarter of an hour on a machine with a GPU, in two calls of at most six and five minutes: what tells most comes first.
#
#   OUT=DIR bash docs/benchmarks/gpu_session.sh first    facts, latency of small transfers, tests, first light
#   OUT=DIR bash docs/benchmarks/gpu_session.sh second   the figure at 70B's shape, then sanitizer if time is left
#   OUT=DIR bash docs/benchmarks/gpu_session.sh rest     if a minute or two are left: how fast each format is decoded
#   OUT=DIR bash docs/benchmarks/gpu_session.sh base     the draft that a base is: products against their twin, levels against memory
#   OUT=DIR bash docs/benchmarks/gpu_session.sh STEP...  these steps, in this order
#
# Every step has a limit, and none ends another. After each, OUT gets summary.txt and results.tar.gz; WORK keeps everything.
# Nothing is installed or fetched. SMALL=1: the same on a CPU, with small models; CI runs that.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export OUT=${OUT:?name a folder for what is to be kept} WORK=${WORK:-/tmp/treestream-session} PYTHON=${PYTHON:-python3}
export SMALL=${SMALL:-} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT" "$WORK"

step() { "$PYTHON" tests/gpu_session.py "$1" --out "$WORK" --seconds "$((TIME - 15))" ${SMALL:+--small}; }

facts() { # link generation, copy rate, registration of 4 GiB, free memory
    [ -n "$SMALL" ] || nvidia-smi || true
    lscpu | head -15; free -g; ulimit -l; uname -r; cat /sys/kernel/mm/transparent_hugepage/enabled
    step facts
}
latency() { step latency; } # of 64 KiB up and a few numbers down while a layer is copied: do they wait for it?
light() { step light; }     # the bundled pair; eight layers as wide as 70B's, draft passes eager and as graphs, same text
figure() { step figure; }   # 70B: ours with a trace of two rounds, plain, Accelerate
formats() { # larger than a cache; by kernels and by plain torch
    "$PYTHON" tests/bench_formats.py --seconds 0.2 $([ -n "$SMALL" ] && echo "--rows 48 --columns 256" || echo "--device cuda --rows 6144 --columns 8192")
}
base() { # levels of 70B's layers first, then what compiling takes longest for
    "$PYTHON" tests/bench_base.py --seconds 0.1 $([ -n "$SMALL" ] || echo "--device cuda --hidden 8192 --intermediate 28672 --kv 1024 --layers 2")
    FILES=tests/test_gpu_base.py pytest env
}

export FILES="tests/test_gpu.py tests/test_gpu_decoders.py"
pytest() { "$@" "$PYTHON" -m pytest -v -s -W default -p no:cacheprovider --durations=10 -m gpu $FILES; }
tests() { pytest env; } # in the order of the file, the fastest first
sanitizer() {
    command -v compute-sanitizer || { echo "no compute-sanitizer on the PATH"; return 0; }
    pytest compute-sanitizer --tool memcheck --error-exitcode 9 -k "recordings_share or exactly"
}

declare -A LIMIT=([facts]=50 [latency]=40 [tests]=100 [light]=150 [figure]=240 [sanitizer]=60 [formats]=110 [base]=170)
declare -A CALLS=([first]="facts latency tests light" [second]="figure sanitizer" [rest]="formats" [base]="base")
declare -A TOTAL=([first]=350 [second]=290 [rest]=110 [base]=170)

pack() {
    {
        echo "commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown), $(date -u +%FT%TZ)"
        cat "$WORK"/*.status 2>/dev/null
        for file in "$WORK"/*.txt; do echo; echo "== $(basename "$file" .txt)"; tail -n 25 "$file" | cut -c 1-400; done
    } >"$OUT/summary.txt"
    tar -C "$WORK" -czf "$OUT/results.tar.gz" .
}

# A CPU that CI shares with others may take its time.
[ -z "$SMALL" ] || for name in "${!LIMIT[@]}"; do LIMIT[$name]=$((LIMIT[$name] * 5)); done
steps=${CALLS[${1:?first, second, or names of steps}]:-$*}
total=$((${TOTAL[$1]:-600} * (${SMALL:+4} + 1)))
for name in $steps; do
    [ -n "${LIMIT[$name]:-}" ] || { echo "no step $name: ${!LIMIT[*]}"; exit 2; }
    left=$((total - SECONDS)) TIME=${LIMIT[$name]}
    TIME=$((TIME < left ? TIME : left)) began=$SECONDS
    if [ "$TIME" -lt 20 ]; then
        echo "$name not begun, $left s are left" | tee "$WORK/$name.status"
        continue
    fi
    export TIME
    # A process group of its own, so that what a step started ends with it.
    timeout -k 5 "$TIME" bash -c "set -uo pipefail; $(declare -f step pytest "$name"); $name" >"$WORK/$name.txt" 2>&1
    code=$?
    echo "$name $([ $code -eq 0 ] && echo ok || echo "failed with $code") after $((SECONDS - began)) s" | tee "$WORK/$name.status"
    pack
done
pack
