#!/usr/bin/env bash
# One session on a GPU machine: what is worth most first, each step with a time of its own, a failure ends no other step.
#
#   OUT=DIR bash docs/benchmarks/gpu_session.sh [STEP ...]      no STEP: all that are not done; names: see STEPS below
#
# Outputs gather in WORK, which outlives a call; OUT gets them packed after every step: results.tar.gz and summary.txt.
# SECONDS_LEFT ends the call before whoever started it does. On a machine without a GPU, these run the same commands small:
# DEVICE=cpu SCALE=tiny-llama-shape LAYERS="6 8" GPU_MEMORY=200MiB HOST_MEMORY=200MiB DTYPE=float32
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

OUT=${OUT:?name a folder for what is to be kept}
WORK=${WORK:-/tmp/treestream-session}
PYTHON=${PYTHON:-python3}
DEVICE=${DEVICE:-cuda}
SCALE=${SCALE:-llama-2-70b}
LAYERS=${LAYERS:-8 24 80}
GPU_MEMORY=${GPU_MEMORY:-48GiB}
DTYPE=${DTYPE:-float16} # of the scale models: near ties fall eight times less often than in bfloat16
HOST_MEMORY=${HOST_MEMORY:-24GiB} # where speed is looked at: identical layers share it, which loads in seconds
SECONDS_LEFT=${SECONDS_LEFT:-570}
DEMO=(--model offload/demo/target --draft-model offload/demo/draft --device "$DEVICE" --dtype float32)
PROMPT=(--prompt "The Congress of the United States should" --ignore-eos)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
mkdir -p "$OUT" "$WORK"

# name, seconds: in order of value. A step that the time left does not allow is left for the next call.
STEPS="facts:60 tests:240 demo:90 scale:280 profile:190 table:560 trace:90 leaks:120 sanitizer:200"

run() { "$PYTHON" run_70b.py "$@"; }

facts() {
    nvidia-smi || true
    nvidia-smi --query-gpu=name,memory.total,pcie.link.gen.current,pcie.link.width.current --format=csv || true
    lscpu | head -25; free -g; ulimit -l; uname -r; cat /sys/fs/cgroup/memory.max /sys/kernel/mm/transparent_hugepage/enabled
    run version
    run doctor --device "$DEVICE" --model "$SCALE"
}

# Not the whole folder: other tests import what a GPU machine need not have. Warnings of newer libraries are no failures here.
tests() { "$PYTHON" -m pytest -q -W default -p no:cacheprovider --durations=10 tests/test_gpu.py tests/test_offload_device_ops.py; }

demo() {
    for temperature in 0 0.6; do
        run generate "${DEMO[@]}" "${PROMPT[@]}" -n 128 --seed 1 --temperature "$temperature" \
            --output "$WORK/demo_$temperature.json"
    done
    run generate "${DEMO[@]}" "${PROMPT[@]}" -n 128 --resident-layers 0 --tree none --output "$WORK/demo_plain.json"
    "$PYTHON" docs/benchmarks/same_text.py "$WORK/demo_plain.json" "$WORK/demo_0.json"
}

scale() {
    local failed=0 layers
    run generate "${DEMO[@]}" "${PROMPT[@]}" -n 64 --tree none --output "$WORK/scale_reference.json" || return
    for layers in $LAYERS; do
        run generate "${PROMPT[@]}" --model "scale:$SCALE:$layers" --device "$DEVICE" --dtype "$DTYPE" \
            --gpu-memory "$GPU_MEMORY" -n 64 --stats full --output "$WORK/scale_$layers.json" || failed=1
        "$PYTHON" docs/benchmarks/same_text.py "$WORK/scale_reference.json" "$WORK/scale_$layers.json" || failed=1
    done
    return $failed
}

profile() {
    run profile hardware --model "$SCALE" --draft-model offload/demo/draft --device "$DEVICE" --output "$WORK/hardware.json"
}

# The suite keeps its records: called again, it goes on with what is missing. It is given more time than it has, as the steps
# that matter come first: link, table and baselines should end, the step after them is cut off and begins anew another time.
table() {
    local measured=()
    [ -f "$WORK/hardware.json" ] && measured=(--profile "$WORK/hardware.json")
    run bench suite --device "$DEVICE" --out "$WORK/suite" --max-seconds 900 "${measured[@]}"
}

trace() {
    run generate "${PROMPT[@]}" --model "scale:$SCALE:${LAYERS##* }" --device "$DEVICE" --dtype "$DTYPE" \
        --gpu-memory "$GPU_MEMORY" --host-memory "$HOST_MEMORY" -n 40 \
        --trace "$WORK/round_trace.json" --output "$WORK/trace_run.json"
}

leaks() { "$PYTHON" docs/benchmarks/gpu_leaks.py --device "$DEVICE"; }

sanitizer() {
    command -v compute-sanitizer || { echo "no compute-sanitizer on the PATH"; return 0; }
    compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -W default -p no:cacheprovider tests/test_gpu.py \
        -k "poisoned_slots or exception_in_a_layer"
}

pack() {
    {
        echo "commit $(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown), $(date -u +%FT%TZ)"
        cat "$WORK"/*.status 2>/dev/null
        for file in "$WORK"/*.txt; do echo; echo "== $(basename "$file")"; tail -n 15 "$file"; done
    } >"$OUT/summary.txt"
    tar -C "$WORK" -czf "$OUT/results.tar.gz" .
}

number=0
for entry in $STEPS; do
    name=${entry%:*} TIME=${entry#*:} number=$((number + 1))
    file=$(printf '%s/%02d-%s' "$WORK" "$number" "$name")
    if [ $# -gt 0 ]; then
        [[ " $* " == *" $name "* ]] || continue
    elif grep -qs ' ok ' "$file.status"; then
        continue
    fi
    left=$((SECONDS_LEFT - SECONDS))
    if [ "$left" -lt $((TIME / 3 + 15)) ]; then
        echo "$name: not begun, $left s are left"
        continue
    fi
    TIME=$((TIME < left ? TIME : left)) began=$SECONDS
    export TIME OUT WORK PYTHON DEVICE SCALE LAYERS GPU_MEMORY HOST_MEMORY DTYPE
    # A process group of its own, so that what a step started ends with it.
    timeout -k 10 "$TIME" bash -c "set -uo pipefail; $(declare -f run "$name"); $(declare -p DEMO PROMPT); $name" >"$file.txt" 2>&1
    code=$?
    echo "$name $([ $code -eq 0 ] && echo ok || echo "failed with $code") after $((SECONDS - began)) s" | tee "$file.status"
    pack
done
pack
