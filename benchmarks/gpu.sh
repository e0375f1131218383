#!/bin/sh
# Every benchmark that takes a device, on a GPU, one after the other; tables with device and versions go to results/.
# Each has its limit, 30 minutes in all; one that fails or runs out of time is named at the end.
#
#     sh benchmarks/gpu.sh
cd "$(dirname "$0")/.." || exit 1
failed=""

run() { # seconds, script, arguments
    limit=$1
    shift
    echo "== $*"
    timeout "$limit" python "benchmarks/$1.py" --device cuda $(shift; echo "$@") || failed="$failed $1"
}

run 240 step_time
run 60 boundary_floor
run 300 norm_step
run 240 norm_latency --dtype float16 --batches 1 64
run 120 temp_scale_time
run 180 linear_attention --dtype float16 --batch 8
run 180 monitor_cost
run 240 start_of_run --rounds 2
run 240 sharded --processes 1

[ -z "$failed" ] || { echo "not done:$failed" >&2; exit 1; }
