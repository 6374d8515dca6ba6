#!/usr/bin/env bash
# What a GPU has to show, on a bare machine and within 12 minutes; README.md says what is carried there.
#
#   bash experiments/gpu/run.sh CARRIED RESULTS [PART…]     parts: tests speeds train hold evaluate longest
#
# DEVICE=cpu does without a GPU, TINY=1 does little of everything, and all of it to its end.
# Each part has a limit of its own, and leaves its csv and a line in summary.csv when it ends, whether it fails or not.
set -uo pipefail

carried=$(realpath "$1") && mkdir -p "$2" && results=$(realpath "$2") && shift 2 || exit 2
[ $# -gt 0 ] || set -- tests speeds train hold evaluate longest
here=$(realpath "$(dirname "$0")")
root=$(dirname "$(dirname "$here")")
work=${WORK:-${TMPDIR:-/tmp}/rmt_gpu}
site=$work/site run=$work/run log=$results/log.txt
mkdir -p "$work" && cd "$work" || exit 2

export PYTHONPATH=$site:$root RMT_LIGHTNING_CACHE=$work/cache RMT_TEST_DEVICE=${DEVICE:-cuda}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 COLUMNS=150
[ "$RMT_TEST_DEVICE" = cuda ] || export CUDA_VISIBLE_DEVICES=
install=(python3 -m pip install --quiet --no-index --no-deps --no-compile --target)
[ -d "$site" ] || "${install[@]}" "$site" "$carried"/wheels/*.whl || exit 2
machine=$(python3 -c "import torch as t; print(t.__version__, t.cuda.get_device_name() if t.cuda.is_available() else 'no GPU')")
case "$RMT_TEST_DEVICE $machine" in cuda*"no GPU") echo "torch finds no GPU; DEVICE=cpu does without" >&2; exit 2 ;; esac
[ -f "$results/summary.csv" ] || echo "part,exit_code,seconds,figures" >"$results/summary.csv"
echo "machine,0,$SECONDS,torch $machine" >>"$results/summary.csv"

# part NAME SECONDS COMMAND…
part() {
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    [ -z "${TINY:-}" ] || limit=1200
    echo "== $name: $*" | tee -a "$log"
    timeout --kill-after=20 "$limit" "$@" 2>&1 | tee "$work/$name.txt" >>"$log"
    code=${PIPESTATUS[0]}
    python3 "$here/collect.py" "$name" "$work" "$results" "$code" $((SECONDS - began)) 2>>"$log"
    tail -n 1 "$results/summary.csv"
}

# A run of the preset ends in time by max_time, and is resumed by the next part with what there is.
preset=(
    experiment=minilm_512 task=detect backbone.name="$carried/minilm" data.num_workers=8 test.samples=64
    noise=files noise.path="$carried/stories/train.jsonl" noise.validation_path="$carried/stories/dev.jsonl"
    noise.field=document "test.segments=[1,8]"
    data.validation_samples=256 curriculum.when_stuck=continue hold.steps=800 hold.rounds=2
)
only=(train/BERT-base stream/ train/MiniLM/7 schedule/) followed=512
lengths=1,8,64,512 longest=4096 samples=64
if [ -n "${TINY:-}" ]; then
    preset+=(
        data.segment_length=64 data.batch_size=2 data.num_workers=0 data.validation_samples=4 data.steps_per_epoch=2
        curriculum.max_segments=2 curriculum.steps=2 hold.steps=4 hold.rounds=1 test.samples=2
    )
    only=(stream/tiny/batch\ 1) followed=32
    lengths=1,8 longest=64 samples=16
fi
evaluate=(python3 -m rmt_lightning.evaluate "checkpoint=$run" "samples=$samples" "follow=$followed")

for name in "$@"; do
    case $name in
    tests) part tests 210 python3 -m pytest -p no:cacheprovider -o addopts= -v --tb=short "$root/tests/test_gpu.py" ;;
    speeds)
        part speeds 190 python3 "$root/experiments/benchmarks/run.py" --only "${only[@]}" \
            --output "$results/speeds.csv" ${TINY:+--turns 1} ;;
    train)
        rm -rf "$run"
        part train 110 python3 -m rmt_lightning.train "hydra.run.dir=$run" "${preset[@]}" trainer.max_time=00:00:01:00 ;;
    hold) part hold 120 python3 -m rmt_lightning.train "resume=$run" trainer.max_time=00:00:01:15 ;;
    evaluate) part evaluate 60 "${evaluate[@]}" "segments=[$lengths]" ;;
    longest) part longest 100 "${evaluate[@]}" "segments=[$longest]" ;;
    *) echo "$name: no such part" >&2 ;;
    esac
done
column -s, -t "$results/summary.csv" 2>/dev/null || cat "$results/summary.csv"
