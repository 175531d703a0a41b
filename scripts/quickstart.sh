#!/usr/bin/env bash
# From nothing to a closed-loop success rate: record, statistics, train, evaluate. About five minutes on two cores.
#
#   bash scripts/quickstart.sh            the whole run
#   bash scripts/quickstart.sh --short    every stage at a fraction of its size: does it work here?
#
# Everything lands in experiments/quickstart (an earlier run there is moved aside) and demos/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment requirements.txt requirements-sim.txt
require_offscreen_rendering

NAME=quickstart DEMOS=60 HELD_OUT=4 EPISODES=20 SHORT=()
if [ "${1:-}" = --short ]; then
    NAME=quickstart_short DEMOS=3 HELD_OUT=1 EPISODES=2 SHORT=(training.max_steps=30 training.log_interval=10)
elif [ $# -gt 0 ]; then
    echo "usage: bash scripts/quickstart.sh [--short]" >&2
    exit 2
fi
TASKS=(button-press-topdown-v3 window-open-v3)
DATA="demos/$NAME" OUT="experiments/$NAME" CONFIG=configs/quickstart.yaml
POLICY="$OUT/checkpoints/model_best.pth.tar"
# A process trains on each of two cores and makes its batches itself; a GPU needs one.
TRAIN=(main_train.py) SETTINGS=()
if ! command -v nvidia-smi >/dev/null 2>&1 && [ "$("$PYTHON" -c 'import os; print(os.cpu_count())')" -ge 2 ]; then
    TRAIN=(main_train_ddp.py --nproc 2) SETTINGS=(data.num_workers=0)
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PYTHONUNBUFFERED=1
if [ -e "$OUT" ]; then
    mv "$OUT" "$OUT.$(date +%Y%m%d-%H%M%S)"
fi
mkdir -p "$OUT"

SECONDS_LIST=()
stage() { # name, command ...: run it and keep the time
    local name="$1" began=$SECONDS
    shift
    echo
    echo "== $name: $*"
    "$@"
    SECONDS_LIST+=("$name=$((SECONDS - began))")
}
record() { "$PYTHON" scripts/record_demos.py --env metaworld --tasks "${TASKS[@]}" --overwrite "$@"; }
record_both() {
    record --episodes "$DEMOS" --output_dir "$DATA/train" --seed 0
    record --episodes "$HELD_OUT" --output_dir "$DATA/val" --seed 5000
}
rollouts() { # name, flags ...
    local name="$1"
    shift
    "$PYTHON" main_eval.py --env metaworld --tasks "${TASKS[@]}" --episodes "$EPISODES" --seed 10000 \
        --output_dir "$OUT/$name" "$@" >"$OUT/$name.log" 2>&1 || {
        cat "$OUT/$name.log" >&2
        return 1
    }
}
policy_side() {
    rollouts closed_loop --checkpoint_path "$POLICY" --num_videos 4
    rollouts swapped_prompt --checkpoint_path "$POLICY" --swap_prompts --num_videos 1
}
control_side() {
    rollouts blind --checkpoint_path "$POLICY" --blind --num_videos 1
    rollouts replay --control replay --demos_path "$DATA/train" --num_videos 1
}
show_progress() { # until it is killed
    local all=$((4 * ${#TASKS[@]} * EPISODES)) # of the policy, its two variants, and the replayed demonstrations
    while sleep 15; do
        echo "   $(find "$OUT" -name episodes.jsonl -exec cat {} + 2>/dev/null | wc -l) of $all episodes"
    done
}
closed_loop() { # two processes: the policy on one core, its controls on the other
    control_side &
    local controls=$!
    show_progress &
    local progress=$!
    trap "kill $progress 2>/dev/null || true" EXIT
    policy_side
    wait "$controls"
    kill "$progress"
    trap - EXIT
}

stage record record_both
stage tiny_checkpoint "$PYTHON" scripts/make_tiny_paligemma.py --output_dir weight/tiny-paligemma
stage statistics "$PYTHON" utils/calculate_normalization_stats.py --config_path "$CONFIG" \
    --train_data_override "$DATA/train" --output_path "$DATA/normalization_stats.json"
stage train "$PYTHON" "${TRAIN[@]}" --config_path "$CONFIG" --experiment_name "$NAME" \
    --train_data_override "$DATA/train" --val_data_override "$DATA/val" \
    --set data.normalization_stats_path="$DATA/normalization_stats.json" "${SETTINGS[@]}" "${SHORT[@]}"
stage evaluate_offline "$PYTHON" main_eval.py --checkpoint_path "$POLICY" --eval_data_path "$DATA/val" \
    --output_dir "$OUT/offline" --save_predictions
stage evaluate_closed_loop closed_loop
"$PYTHON" scripts/quickstart_summary.py --experiment_dir "$OUT" --seconds "${SECONDS_LIST[@]}"
