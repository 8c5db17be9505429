#!/usr/bin/env bash
# Everything a machine with a GPU should answer, in one command under eight minutes.
#
#   bash bench/gpu.sh                    in an environment where `import mnemos` works
#   bash bench/gpu.sh WHEELS             installs the wheels of that folder first, offline, into a temporary folder
#   bash bench/gpu.sh --dry-run          the plan: every step, its most seconds, its command
#   bash bench/gpu.sh --quick            tiny sizes of every step on the CPU, to see that all of them start
#
#   --minutes N   for all of it (8); every step's own limit shrinks or grows with it
#   --out DIR     for what is found (the variable OUT, else bench/results/gpu-DATE)
#   --only NAMES  steps by name, separated by commas
#
# A step has a time limit of its own, and never more than what is left; the most worth comes first. A failure stops
# nothing. Found afterwards, after every step, in three files, so that what was killed half way has left its part:
# summary.txt (steps, seconds, exit codes, last lines), results.jsonl (all lines of all benches) and logs.tar.gz (one
# log a step, and what else it wrote). Exits 1 when a step failed or was cut off. PYTHON names another python3.
set -uo pipefail
exec </dev/null

usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"; }
refuse() {
    echo "error: $1" >&2
    exit 2
}

minutes=8 quick="" dry="" only="" wheels="" out=${OUT:-}
while (($#)); do
    case $1 in
        --minutes | --out | --only)
            [[ -n ${2:-} ]] || refuse "$1 needs a value; --help shows the command"
            case $1 in --minutes) minutes=$2 ;; --out) out=$2 ;; --only) only=,$2, ;; esac
            shift
            ;;
        --quick) quick=yes ;;
        --dry-run) dry=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        -*) refuse "$1 is no flag of this command; --help shows them" ;;
        *)
            [[ -z $wheels ]] || refuse "$1: one folder of wheels is enough; drop it"
            [[ -d $1 ]] || refuse "$1: is no folder of wheels; name one, or none to use what is installed"
            wheels=$(cd "$1" && pwd)
            ;;
    esac
    shift
done
[[ $minutes =~ ^[1-9][0-9]{0,3}$ ]] || refuse "--minutes $minutes: whole minutes above 0 are allowed"

python=$(command -v "${PYTHON:-python3}") || refuse "${PYTHON:-python3}: there is no such command; set PYTHON"
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[[ $python == /* ]] || python=$PWD/$python
out=${out:-$repo/bench/results/gpu-$(date +%Y%m%d-%H%M%S)}
[[ $out == /* ]] || out=$PWD/$out
work=${TMPDIR:-/tmp}/mnemos-gpu-$$ # made below, and removed at the end
logs=$work/logs site=$work/site found=$out/results.jsonl
budget=$((60 * minutes))
listing="" # set while the names of all steps are gathered
known=()
running="" # what a signal has to end
times=() # lines of the summary
failed=0

# step NAME MOST_S COMMAND...: run a step, or print it. MOST_S are seconds of eight minutes.
step() {
    local name=$1 limit=$(($2 * minutes / 8)) left=$((budget - SECONDS)) code=0 begin=$SECONDS
    shift 2
    if [[ -n $listing ]]; then
        known+=("$name")
        return 0
    fi
    [[ -z $only || $only == *,$name,* ]] || return 0
    ((limit > 0)) || limit=1
    if [[ -n $dry ]]; then
        printf '%-12s %4d s  %s\n' "$name" "$limit" "$*"
        return 0
    fi
    if ((left < 5)); then
        note "$name" 0 - "not begun: the time was spent"
        return 0
    fi
    ((limit <= left)) || limit=$left
    printf -- '---- %s (at most %d s of %d left)\n' "$name" "$limit" "$left"
    timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 &
    running=$! # in the background, so that a signal to us is acted on at once
    wait "$running" || code=$?
    running=""
    local said
    said=$(tr '\r' '\n' <"$logs/$name.log" | grep -v -e '^[[:space:]]*$' -e '%|' -e '^not ' -e '^written' -e '\[launch' |
        tail -n 1 | cut -c 1-110)
    ((code != 124 && code != 137)) || said="cut off after $limit s; $said"
    ((code == 0)) || tr '\r' '\n' <"$logs/$name.log" | grep -v '%|' | tail -n 15 | sed 's/^/    | /'
    note "$name" $((SECONDS - begin)) "$code" "$said"
}

# note NAME SECONDS CODE LINE: take a step into the summary and bring the three files up to date.
note() {
    [[ $3 == 0 ]] || failed=1
    times+=("$(printf '%-12s %5s s  %4s  %s' "$@")")
    {
        printf '%-12s %7s  %4s  %s\n' step seconds exit "last line"
        printf '%s\n' "${times[@]}"
    } >"$out/summary.txt"
    tar -czf "$out/logs.tar.gz" -C "$logs" .
    echo "${times[-1]}"
}

# wheels of the folder beside what python has, and `mnemos` as links to this tree: no build, no network
install() {
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
        --target "$site" "$wheels"/*.whl || return
    mkdir -p "$site/mnemos" || return
    local layer
    for layer in engine kernels sharding bench; do
        ln -sfn "$repo/$layer" "$site/mnemos/$layer" || return
    done
    echo "$(find "$wheels" -name '*.whl' | wc -l) wheels"
}

# machine: what it all ran on
machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,power.limit --format=csv,noheader 2>&1
    "$python" -c '
import os, torch, triton
import mnemos.engine.dist
gpus = torch.cuda.device_count()
name = torch.cuda.get_device_name() if gpus else "no GPU"
print(f"{name} x {gpus}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}, triton {triton.__version__}")'
}

# order: the names of the first two stages
order() {
    "$python" -c '
import itertools
from mnemos.sharding.modalities import DEFAULT_ORDER
print(*itertools.islice(DEFAULT_ORDER, 2))'
}

# shards: random ones for the first two stages, which --quick reads
shards() {
    local stages
    read -r -a stages <<<"$(order)"
    "$python" -c '
import sys
from pathlib import Path
from mnemos.bench.scaling_runs import make_shards
from mnemos.sharding.modalities import MODALITIES
for name in sys.argv[2:]:
    make_shards(Path(sys.argv[1]), MODALITIES[name], "sample", 48)' "$work/shards" "${stages[@]}"
}

# train STEPS [FLAG...]: two stages of the sample preset with the command a user gives
train() {
    local stages
    read -r -a stages <<<"$(order)"
    deepspeed --num_gpus 1 engine/train.py --stage "${stages[1]}" --steps "$1" --run "$work/run" "${@:2}"
}

# attention_briefly: one sweep over one shape of the attention bench, which has no flags for that
attention_briefly() {
    "$python" -c '
from mnemos.bench import attention
shape, *_ = attention._shapes()
attention.SWEEPS = attention.REPEATS = 1
attention._shapes = lambda: [shape]
attention.bench([])'
}

# own NAME MOST_S FUNCTION [ARGUMENT...]: a step that is a function of this file
own() { step "$1" "$2" bash -c "${*:3}"; }

plan() {
    if [[ -n $wheels ]]; then
        own install 90 install
        [[ -n $listing ]] || export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PATH=$site/bin:$PATH
    fi
    own machine 30 machine
    # its reference was published for a CPU only, hence unchecked
    local steps=("$python" bench/step.py --precision bf16 --rounds 3 --no-overhead --unchecked --out "$found")
    if [[ -z $quick ]]; then
        step gemm 40 "$python" bench/gemm.py --out "$found"
        step tests 110 "$python" -m pytest -q -m gpu tests
        step step-512 90 "${steps[@]}" --batch 512 --kinds image --phases pretext rehearsal --end-to-end
        step step-128 120 "${steps[@]}" --batch 128 --phases pretext rehearsal --vocabularies own
        step profile 45 "$python" bench/step_profile.py --kind image --phase pretext --out "$logs/profile" --json "$found"
        step kmeans 70 "$python" bench/kmeans.py --samples 1000000 --width 768 --clusters 10000 --rounds 1 --out "$found"
        own train 80 train 40
        step ops 120 "$python" bench/ops.py --preset base --dtype bf16 --out "$found"
        step loader 60 "$python" bench/loader.py --sorts rgb volume --rounds 3 --out "$found" # grey needs OpenCV
        step attention 60 "$python" bench/attention.py
        step step-512-3d 60 "${steps[@]}" --batch 512 --kinds volume --phases pretext --end-to-end
        step step-512-1d 60 "${steps[@]}" --batch 512 --kinds text --phases pretext --end-to-end
        step scaling 45 "$python" bench/scaling.py --preset base --no-check --rounds 3 --intra-gbps 3600 \
            --inter-gbps 3200 --latency-us 20 --ranks-per-node 8 --picture "$logs/scaling.png" --out "$found"
    else
        own shards 40 shards
        step gemm 40 "$python" bench/gemm.py --rows 32 --rounds 1 --sizes 512x768 --out "$found"
        step tests 110 "$python" -m pytest -q --collect-only -m gpu tests/test_gpu_step.py
        step step 100 "${steps[@]}" --preset sample --batch 16 --kinds image --phases pretext --rounds 1 --steps 1 \
            --shards "$work/shards"
        step profile 45 "$python" bench/step_profile.py --kind image --phase pretext --preset sample --steps 1 --batch 4 \
            --data "$work/shards" --out "$logs/profile" --json "$found"
        step kmeans 70 "$python" bench/kmeans.py --samples 2000 --width 16 --clusters 20 --rounds 1 --backends faiss \
            --peers --out "$found"
        own train 80 train 2 --data "$work/shards"
        step ops 120 "$python" bench/ops.py --op gather_tokens --passes forward --dtype fp32 --providers ours eager \
            --out "$found"
        step loader 60 "$python" bench/loader.py --quick --sorts grey --out "$found"
        own attention 60 attention_briefly
        step scaling 45 "$python" bench/scaling.py --no-check --data "$work/shards" --rounds 1 --updates 1 --intra-gbps 100 --latency-us 20 \
            --ranks-per-node 1 --ranks 1 2 --picture "$logs/scaling.png" --out "$found"
    fi
}

# stop CODE: end the step under way, and ourselves
stop() {
    [[ -z $running ]] || { kill "$running" && wait "$running"; } 2>/dev/null
    exit "$1"
}

listing=yes
plan
listing=""
for name in ${only//,/ }; do
    [[ " ${known[*]} " == *" $name "* ]] || refuse "--only $name: there is no such step; there are ${known[*]}"
done
has_all='from importlib.util import find_spec as f; import sys; sys.exit(not (f("torch") and f("mnemos")))'
if [[ -z $dry && -z $wheels ]] && ! "$python" -c "$has_all"; then
    refuse "$python: has no torch or no mnemos; call this in the project's environment, set PYTHON, or name a folder of wheels"
fi
if [[ -z $dry ]]; then
    trap 'rm -rf "$work"' EXIT
    trap 'stop 130' INT
    trap 'stop 143' TERM
    mkdir -p "$logs" "$out" || refuse "--out $out: cannot be made; name another folder"
fi
cd "$repo" || exit 1
export PATH=${python%/*}:$PATH PYTHONUNBUFFERED=1
export python repo work site wheels
export -f install machine order shards train attention_briefly
if [[ -n $quick ]]; then
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
plan
[[ -z $dry ]] || exit 0
printf '\n%s\n' "$(<"$out/summary.txt")"
echo "$SECONDS s of $budget; in $out: summary.txt, results.jsonl, logs.tar.gz"
exit "$failed"
