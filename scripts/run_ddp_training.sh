#!/usr/bin/env bash
# Distributed training under torchrun, on one machine or, run once on each, on several.
#
#   bash scripts/run_ddp_training.sh --config configs/vla_config_ddp.yaml --experiment_name fold_towel
#   bash scripts/run_ddp_training.sh --config C --nproc 8 --nnodes 2 --node_rank 0 --rdzv_endpoint host0:29500
#
# --wandb_project P logs to Weights & Biases. Without --nproc one process per GPU is started. Further arguments go to
# main_train_ddp.py. Several machines need training.checkpoint_dir and the data at the same place on all of them.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
# This machine's address on the way to another one (or to itself); nothing where that can't be found out.
address_towards() {
    local there
    there=$(getent ahostsv4 "$1" | awk '{ print $1; exit }') || true
    [ -n "$there" ] && command -v ip >/dev/null && ip -o route get "$there" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p' || true
}
CONFIG="" NPROC=gpu NNODES=1 NODE_RANK=0 ENDPOINT="" ARGUMENTS=()
while [ $# -gt 0 ]; do
    case "$1" in
    --config | --config_path | --experiment_name | --wandb_project | --nproc | --nnodes | --node_rank | --rdzv_endpoint)
        [ $# -ge 2 ] || {
            echo "error: $1 needs a value" >&2
            usage
        }
        ;;&
    --config | --config_path) CONFIG="$2" && shift 2 ;;
    --experiment_name) ARGUMENTS+=(--experiment_name "$2") && shift 2 ;;
    --wandb_project) ARGUMENTS+=(--use_wandb --wandb_project_name "$2") && shift 2 ;;
    --nproc) NPROC="$2" && shift 2 ;;
    --nnodes) NNODES="$2" && shift 2 ;;
    --node_rank) NODE_RANK="$2" && shift 2 ;;
    --rdzv_endpoint) ENDPOINT="$2" && shift 2 ;;
    -h | --help) usage ;;
    *) ARGUMENTS+=("$1") && shift ;;
    esac
done
[ -n "$CONFIG" ] || {
    echo "error: --config is missing" >&2
    usage
}
if [ "$NNODES" = 1 ]; then
    MEETING=(--standalone)
elif [ -n "$ENDPOINT" ]; then
    # torchrun would guess from host names which machine hosts the meeting, and by which address others reach this one.
    IS_HOST=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0)
    MEETING=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --rdzv_backend c10d --rdzv_endpoint "$ENDPOINT"
        --rdzv_id "${RDZV_ID:-paligemma_vla}" --rdzv_conf "is_host=$IS_HOST")
    ADDRESS=$(address_towards "${ENDPOINT%:*}")
    if [ -n "$ADDRESS" ]; then
        MEETING+=(--local_addr "$ADDRESS")
        INTERFACE=$(ip -o addr show to "$ADDRESS" | awk '{ sub(/@.*/, "", $2); print $2; exit }')
        export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-$INTERFACE}" NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME:-$INTERFACE}"
    fi
else
    echo "error: --nnodes $NNODES needs --rdzv_endpoint HOST:PORT, the same on every machine" >&2
    exit 2
fi

PYTHON="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}"
if [ "$NPROC" = gpu ] && ! "$PYTHON" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' >/dev/null 2>&1; then
    echo "error: no GPU on this machine (as torch sees it); --nproc N starts N processes on the CPU" >&2
    exit 2
fi
# After SIGTERM the ranks finish their step and save; torchrun would kill them after 30 seconds (before 2.13 it does).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
COMMAND=("$PYTHON" -m torch.distributed.run --nproc_per_node "$NPROC" "${MEETING[@]}"
    main_train_ddp.py --config_path "$CONFIG" "${ARGUMENTS[@]}")
[ "$NNODES" != 1 ] || exec "${COMMAND[@]}"

# Where the machine that hosts the meeting can't be reached any more, torchrun waits for it although its ranks have ended.
"${COMMAND[@]}" &
TORCHRUN=$!
trap 'kill -TERM "$TORCHRUN" 2>/dev/null' TERM HUP
trap 'kill -INT "$TORCHRUN" 2>/dev/null' INT
TRAINED=0 LEFT=${LEAVE_AFTER_S:-60}
while kill -0 "$TORCHRUN" 2>/dev/null && [ "$LEFT" -gt 0 ]; do
    if ps -o stat= --ppid "$TORCHRUN" | grep -qv Z; then # ranks that have not ended
        TRAINED=1 LEFT=${LEAVE_AFTER_S:-60}
    elif [ "$TRAINED" = 1 ]; then
        LEFT=$((LEFT - 1))
    fi
    sleep 1
done
if [ "$LEFT" -le 0 ]; then
    echo "error: this machine's ranks have ended, and $ENDPOINT is not heard of: torchrun was ended" >&2
    kill -KILL "$TORCHRUN"
    exit 1
fi
wait "$TORCHRUN"
