#!/usr/bin/env bash
# Trains a config with one process per GPU, on one or several machines; without GPUs, on the CPU.
#
#   NNODES       number of machines; start this script on each of them (default: 1)
#   NODE_RANK    number of this machine, from 0 (default: 0)
#   MASTER_ADDR  address of machine 0 (default: 127.0.0.1)
#   PORT         free port of machine 0 (default: 29500)
set -euo pipefail
if [[ $# -lt 2 || ! $2 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG GPUS [arguments of train.py]" >&2
    exit 2
fi
config=$1 gpus=$2
shift 2
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node="$gpus" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$config" --launcher=pytorch "$@"
